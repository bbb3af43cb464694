"""`finetune train`, `preflight` and `quantize`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import Debug, Device, Json, Output, Overrides, RandomWeights, RecipePath, sane_size
from finetune.cli.reporting import reporting
from finetune.console import gib
from finetune.recipe import load_recipe


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output.dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output.dir.")] = False,
    random_weights: RandomWeights = False,
    force: Annotated[bool, typer.Option("--force", help="Train although the memory estimate says no.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune by a recipe; exit status 1 where an alarm stopped it.

    SIGTERM and Ctrl+C end it after the step that is running, with a checkpoint: exit status 143 and 130. A second one
    ends it at once.
    """
    flags = {"--random-weights": random_weights, "--force": force, "--json": as_json, "--debug": debug}
    settings = [f"--set={setting}" for setting in overrides or ()]
    goes_on = resuming_command([str(recipe), *settings, *(flag for flag, given in flags.items() if given)])
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        from finetune.train import train as run

        summary = run(
            loaded,
            report,
            resume=resume,
            overwrite=overwrite,
            random_weights=random_weights,
            force=force,
            goes_on=goes_on,
        )
        if summary:
            report.finish(summary)
    if summary and summary["stopped_by"] is not None:
        raise typer.Exit(1)


def resuming_command(arguments: Sequence[str]) -> str:
    """The command that resumes a run with these arguments; that of the launcher, where one has started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = Path(f"/proc/{os.getppid()}/cmdline")
        if parent.is_file():
            words = parent.read_text(encoding="utf-8", errors="replace").rstrip("\0").split("\0")
            return shlex.join([*(word for word in words if word not in ("--overwrite", "--resume")), "--resume"])
    return shlex.join([*_started_as(), *arguments, "--resume"])


def _started_as() -> list[str]:
    """`finetune train`, in the words that start it where this process was started."""
    program = Path(sys.argv[0])
    if program.parts[-2:] == ("finetune", "__main__.py"):
        return [sys.executable, "-m", "finetune", "train"]
    if program.name == "train.py":
        return [sys.executable, str(program)]
    found = shutil.which("finetune")
    on_path = program.name != "finetune" or (found is not None and os.path.samefile(found, program))
    return ["finetune" if on_path else str(program), "train"]


def preflight(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu_gib: Annotated[
        float | None, typer.Option(callback=sane_size, help="Estimate for a GPU of this size, at hand or not.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a recipe, without a GPU and without weights; exit status 1 where it does not fit."""
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        from torch import device as torch_device

        from finetune.memory import preflight as run
        from finetune.memory import show_memory
        from finetune.moe import resolve_device

        bytes_given = None if gpu_gib is None else int(gpu_gib * 2**30)
        device = torch_device("cuda") if gpu_gib is not None else resolve_device(loaded.model.device)
        memory = run(loaded, device, device_bytes=bytes_given)
        show_memory(memory, report)
        report.finish(memory.to_dict())
    if not memory.fits:
        raise typer.Exit(1)


def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.", show_default=False)],
    output: Output,
    attention: Annotated[str, typer.Option(help="nf4 or 16bit.")] = "nf4",
    experts: Annotated[str, typer.Option(help="nf4, or hqq3 or hqq2: 3 or 2 bits, to answer only.")] = "nf4",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model once; the folder then loads without quantizing again."""
    with reporting(as_json, debug) as report:
        from finetune.export import write_quantized

        census = write_quantized(model, output, attention=attention, experts=experts, revision=revision, device=device)
        rows = [(row.role, row.dtype, gib(row.bytes)) for row in census.rows]
        report.table(f"Quantized model in {output}", ("role", "dtype", "size"), rows)
        report.finish({"output": str(output), **census.to_dict()})
