"""`finetune init`: a recipe for one's own model, data and card, asked for or named by flags."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import Debug, Json, sane_size
from finetune.cli.reporting import reporting
from finetune.console import gib
from finetune.errors import FinetuneError


def init(
    model: Annotated[str | None, typer.Option(help="Model folder or hub id.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Data file, folder or hub id.", show_default=False)] = None,
    gpu_gib: Annotated[
        float | None,
        typer.Option(callback=sane_size, help="Memory of the GPU to train on; what this machine has by default."),
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the question, if not found.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answer, if not found.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Recipe file to write.")] = Path("recipe.yaml"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a recipe for your model, data and GPU; what is not named is asked."""
    with reporting(as_json, debug) as report:
        model = _said("model", model, "Model (folder or hub id)")
        data = _said("data", data, "Data (file, folder or hub id)")
        if (prompt_column is None) is not (answer_column is None):
            raise FinetuneError("a question's column and an answer's are named together", fix="give both or neither")
        columns = {} if prompt_column is None else {"prompt": prompt_column, "completion": str(answer_column)}
        from finetune.moe import resolve_device
        from finetune.starter import Wish, write_starter

        device = "cuda" if gpu_gib is not None else resolve_device("auto").type
        plan, memory, about = write_starter(Wish(model, data, columns, gpu_gib, device), output)
        part, may_use = about["parts"][0], memory.device_bytes
        unit = "rows" if plan.packing else "conversations"
        card = "" if gpu_gib is None else f" --gpu-gib {gpu_gib:g}"
        rows = [
            ("conversations", f"{plan.rows:,}", f"{plan.held_out:,} of them held out"),
            ("form", part["sources"][0]["form"], f"template {about['template']}"),
            ("tokens", f"{plan.tokens:,}", f"{part['supervised_share']:.0%} supervised"),
            ("row", f"{plan.length:,} tokens", f"median conversation {part['lengths']['median']:,}"),
            ("step", f"{plan.micro_batch * plan.accumulation} {unit}", f"{plan.steps:,} steps an epoch"),
            ("memory", gib(memory.total_bytes), "" if may_use is None else f"of {gib(may_use)}"),
        ]
        report.table(f"{output}", ("what", "chosen", "from"), rows)
        for fault in about["faults"]:
            report.line(f"{fault['level']}: {fault['what']}; {fault['fix']}")
        file = shlex.quote(str(output))
        report.line(f"look at the data: finetune data check {file} --show 3")
        report.line(f"its memory:       finetune preflight {file}{card}")
        report.line(f"train:            finetune train {file}")
        report.finish({"recipe": str(output), "data": about, "memory": memory.to_dict()})


def _said(name: str, given: str | None, question: str) -> str:
    """What a flag says, or what somebody at the terminal answers.

    Raises:
        FinetuneError: neither.
    """
    if given is not None:
        return given
    if not sys.stdin.isatty():
        fix = f"give --{name}; on a terminal it is asked"
        raise FinetuneError(f"--{name} is missing, and there is no terminal to ask on", fix=fix)
    return str(typer.prompt(question, err=True))
