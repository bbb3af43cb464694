"""The command line: quick where it can be, one JSON document where it is asked for, and the small commands whole.

`train` and `merge` have test files of their own; what is refused is in test_bad_input.py.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.backends.cpu.ops
import pytest
import torch
import typer

from finetune.cli import app
from finetune.cli.options import sane_size
from finetune.cli.reporting import quiet_libraries
from finetune.console import Report
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import recipe_schema
from tests.conftest import REPOSITORY
from tests.running import run_finetune

CLASSIC = REPOSITORY / "recipes" / "mixtral-8x7b" / "qlora-attention-80gb.yaml"
SHAPE = f"model.path={CLASSIC.parent / 'shape'}"


def test_help_and_recipes_wait_for_nothing_heavy() -> None:
    """In a process of its own, because this one has torch already."""
    code = f"""
import contextlib, io, json, sys, time
from finetune.cli import app
said = io.StringIO()
for args in (["--help"], ["train", "--help"], ["recipe", "show", {str(CLASSIC)!r}], ["recipe", "schema"]):
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        app(args)
    if args == ["--help"]:
        seconds = time.process_time()
heavy = [name for name in ("torch", "transformers", "trl", "peft", "datasets", "numpy") if name in sys.modules]
json.dump({{"said": said.getvalue(), "heavy": heavy, "seconds": seconds}}, sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    for command in ("train", "preflight", "quantize", "merge", "generate", "recipe", "--overwrite", "oasst_top1"):
        assert command in found["said"]
    # Processor time of start and `--help`, measured 0.5 s.
    assert found["seconds"] < 1.0


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "finetune", "recipe", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "Print the JSON Schema of recipes" in done.stdout


def test_the_shell_completes_commands_and_options() -> None:
    """As bash asks for it, by typer's protocol."""
    for words, completed in (
        ("finetune tr", "train"),
        ("finetune router an", "analyze"),
        ("finetune train --ov", "--overwrite"),
    ):
        shell = {
            "PYTHONPATH": str(REPOSITORY),
            "_FINETUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        command = [Path(sys.executable).with_name("finetune")]
        done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | shell, capture_output=True, text=True)
        assert completed in done.stdout.split(), done.stderr


def test_versions_and_help_of_every_command() -> None:
    ran = run_finetune("--version")
    assert ran.status == 0
    assert ran.stdout.startswith(f"moe-qlora {importlib.metadata.version('moe-qlora')}, torch {torch.__version__}, ")
    commands = [(command.callback.__name__,) for command in app.registered_commands if command.callback]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        name = group.typer_instance.info.name
        commands += [(name, str(command.name)) for command in group.typer_instance.registered_commands]
    assert ("recipe", "show") in commands
    for command in [(), *commands]:
        short, long = run_finetune(*command, "-h"), run_finetune(*command, "--help")
        assert short == long
        assert short.status == 0
        assert "<bool>" not in short.stdout, command
        assert "--no-" not in short.stdout, command


# ---- recipe ---------------------------------------------------------------------------------------------------


def test_recipe_show_is_a_recipe_with_its_provenance(tmp_path: Path) -> None:
    ran = run_finetune("recipe", "show", CLASSIC, "--set", "training.seed=7")
    assert ran.status == 0
    comments = [line for line in ran.stdout.splitlines() if line.startswith("# ")]
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "python", "git"):
        assert sum(line.startswith(f"# {name}: ") for line in comments) == 1, name
    assert f"# torch: {torch.__version__.partition('+')[0]}" in ran.stdout
    again = tmp_path / "again.yaml"
    again.write_text(ran.stdout)
    assert load_recipe(again) == load_recipe(CLASSIC, ["training.seed=7"])


def test_recipe_as_json() -> None:
    document = run_finetune("recipe", "show", CLASSIC, "--json").document
    assert document["recipe"]["trainable"]["lora"]["r"] == 16
    assert {"packages", "python", "git"} <= set(document)
    assert run_finetune("recipe", "schema").document == recipe_schema()


# ---- preflight ------------------------------------------------------------------------------------------------


def test_preflight_says_what_fits_and_what_to_change() -> None:
    ran = [run_finetune("preflight", CLASSIC, "--set", SHAPE, "--gpu-gib", gib, "--json") for gib in (24, 80)]
    assert [each.status for each in ran] == [1, 0]
    small, large = (each.document for each in ran)
    assert large["fits"]
    assert large["advice"] == []
    assert large["largest_micro_batch"] >= 2
    assert not small["fits"]
    assert small["device_bytes"] == 24 * 2**30 < small["total_bytes"] < large["total_bytes"] < 80 * 2**30
    assert (small["keep_attention"], small["keep_gate_up"]) == (0, 0)
    assert (large["keep_attention"], large["keep_gate_up"]) == (32, 32)
    assert small["total_bytes"] == sum(item["bytes"] for item in small["items"])
    assert small["advice"]

    shown = run_finetune("preflight", CLASSIC, "--set", SHAPE, "--gpu-gib", 24)
    assert shown.status == 1
    assert "Preflight: memory of 2 x 1024 tokens" in shown.stdout
    assert "activations: 0 of 32 layers keep the gate_up output, 0 keep attention\n" in shown.stdout
    assert "does not fit: " in shown.stdout
    for advice in small["advice"]:
        assert f"to make it fit: {advice}\n" in shown.stdout
    assert shown.stderr == ""


def test_preflight_on_a_cpu_looks_at_the_memory_of_the_machine(write_recipe: Callable[..., Path]) -> None:
    document = run_finetune("preflight", write_recipe(), "--json").document
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**28 < document["device_bytes"] <= whole
    assert document["fits"]
    assert document["advice"] == []
    # r * (in + out) of q, k, v, o in two layers of hidden 64, kv width 32, in float32.
    lora = next(item for item in document["items"] if item["name"] == "LoRA")
    assert lora["bytes"] == 4 * 2 * 16 * (128 + 96 + 96 + 128)


# ---- quantize, generate ---------------------------------------------------------------------------------------


def test_a_quantized_folder_is_the_model_quantized_on_the_fly(small_mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    ran = run_finetune("quantize", small_mixtral, "--output", folder, "--device", "cpu", "--json")
    assert ran.status == 0, ran.stderr
    document = ran.document
    assert document["output"] == str(folder)
    assert document["unquantized_experts"] == []
    stored = {(row["role"], row["dtype"]) for row in document["rows"]}
    assert {("experts", "nf4"), ("attention", "nf4"), ("router", "bfloat16")} <= stored
    assert document["total_bytes"] == sum(row["bytes"] for row in document["rows"])

    ids = torch.arange(3, 60).unsqueeze(0)
    for dtype in ("float32", "bfloat16"):
        logits = [
            load_base(BaseSpec(str(path)), dtype=dtype, device="cpu").model(ids).logits
            for path in (small_mixtral, folder)
        ]
        assert torch.equal(*logits)

    prompt = ("--prompt", "What comes after 3?", "--max-new-tokens", 8, "--device", "cpu")
    answers = run_finetune("generate", folder, *prompt, "--json").document
    assert answers["model"] == str(folder)
    (answer,) = answers["answers"]
    assert answer["completion_tokens"] == 8
    streamed = run_finetune("generate", folder, *prompt)
    assert streamed.stdout.strip() == answer["text"]
    assert run_finetune("generate", small_mixtral, *prompt, "--json").document["answers"] == [answer]


def test_generate_side_by_side(small_mixtral: Path, saved_adapter: Path) -> None:
    """An untrained adapter answers as its base."""
    options = ("--prompt", "One?", "--prompt", "Two?", "--max-new-tokens", 4, "--device", "cpu")
    both = run_finetune("generate", saved_adapter, "--against", small_mixtral, *options, "--json").document
    assert [answer["prompt"] for answer in both["answers"]] == ["One?", "Two?"]
    for answer, other in zip(both["answers"], both["against_answers"], strict=True):
        assert answer["text"] == other["text"]


# ---- report ---------------------------------------------------------------------------------------------------


def test_a_report_keeps_standard_output_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(as_json=True)
    with report.working():
        print("a library talks")
        report.line("for people")
        report.table("Title", ("what", "value"), [("loss", "1.0")])
    report.finish({"loss": float("nan"), "worst": float("inf"), "rows": (1, 2)})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "worst": None, "rows": [1, 2]}
    assert "a library talks" in err
    assert "for people" in err


def test_text_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may hold what a markup language would read as a tag."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    report = Report()
    report.line("[bold]path[/x] :smile:")
    report.prose_table("Side by side", ("prompt", "answer"), [("[INST] hi [/INST]", "[/red]")])
    for text in ("[bold]path[/x] :smile:", "[INST] hi [/INST]", "[/red]"):
        assert text in out.getvalue()


PATH = "/data/a folder/of/some/very-long-name/runs/qlora-attention-80gb/adapter/adapter_model.safetensors"


@pytest.mark.parametrize("columns", [60, None])
def test_a_path_is_never_broken(monkeypatch: pytest.MonkeyPatch, columns: int | None) -> None:
    """In lines, titles, cells and the heads of columns; what has spaces breaks only there."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    report = Report()
    path = PATH.replace(" ", "_")
    report.line(f"saved in {PATH}")
    report.table(f"Merged model in {PATH}", ("file", "size"), [(path, "1.0 GiB")] * 2)
    report.prose_table("Side by side", ("prompt", path), [("Hello", "An answer of several words. " * 8 + "x" * 300)])
    assert out.getvalue().count(PATH) == 2
    assert out.getvalue().count(path) == 3
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) < 160, "a long word of an answer is broken"
    assert "…" not in out.getvalue()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, 0.0, -1.0])
def test_a_size_that_is_none(value: float) -> None:
    with pytest.raises(typer.BadParameter, match="is no size; give a number above 0 and of at most 1,000,000"):
        sane_size(value)
    assert sane_size(80.0) == 80.0
    assert sane_size(None) is None


def test_a_library_does_not_speak_before_the_report() -> None:
    """bitsandbytes warns, at each start on some CPUs, that an optional package is missing."""
    logger = bitsandbytes.backends.cpu.ops.logger
    before = logger.level
    try:
        quiet_libraries(debug=False)
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        assert logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)
        logger.setLevel(logging.NOTSET)
        quiet_libraries(debug=True)
        assert logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)
