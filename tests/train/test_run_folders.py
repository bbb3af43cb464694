"""The folder of a run and its adapter's are the same to every command that takes either."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from finetune.cli import app
from finetune.infer.loading import load_models
from tests.running import Ran, refused, run_finetune

CPU = ("--device", "cpu")
ASK = ("--prompt", "Hello", "--max-new-tokens", "3")
# The arguments after the folder. Where there is none, the command takes neither a run nor an adapter.
TAKES: dict[str, tuple[object, ...] | None] = {
    "train": ("--resume",),
    "preflight": ("--json",),
    "merge": ("--rows", 2, *CPU, "--json"),
    "evaluate": ("--max-rows", 2, "--compare", "base", *CPU, "--json"),
    "generate": (*ASK, *CPU, "--json"),
    "chat": (*CPU, "--max-new-tokens", 3),
    "serve": (),
    "push": ("--repo-id", "tuned", "--dry-run", "--json"),
    "recipe show": ("--json",),
    "data check": ("--json",),
    "adapter inspect": ("--json",),
    "router drift": (*CPU, "--max-tokens", 64, "--json"),
    "router analyze": (*CPU, "--max-tokens", 64, "--json"),
    "router report": ("--json",),
    "bench train": None,  # takes a recipe, in a process of its own: `recipe show` stands for it
    "bench decode": None,
}
NEITHER = {"quantize", "pull", "init", "recipe schema", "recipe list", "recipe copy"}


def commands() -> set[str]:
    group: Any = typer.main.get_command(app)
    below = {name: getattr(command, "commands", None) for name, command in group.commands.items()}
    return {f"{name} {inner}" if inner else name for name, inners in below.items() for inner in inners or [""]}


def test_every_command_is_listed_here() -> None:
    assert commands() - NEITHER == set(TAKES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_mixtral: Path, conversations: Path) -> Path:
    """A finished run of two steps, with checkpoints, whose routers were compared with the base."""
    folder = tmp_path_factory.mktemp("a run") / "run"
    recipe = {
        "model": {"path": str(small_mixtral), "device": "cpu"},
        "data": {"train": str(conversations), "eval": str(conversations), "max_eval_rows": 4},
        "training": {"max_steps": 2, "max_length": 64, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2},
        "router": {"figures": False, "probe_tokens": 64},
        "output": {"dir": str(folder)},
    }
    file = folder.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    ran = run_finetune("train", file)
    assert ran.status == 0, ran.stderr
    return folder


def said(command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    arguments = list(TAKES[command] or ())
    if command == "merge":
        arguments += ["--output", tmp_path / folder.name]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    ran = run_finetune(*command.split(), folder, *arguments)
    assert ran.status == 0, ran.stderr
    return ran


def without_paths(text: str, run: Path, tmp_path: Path) -> str:
    names = (f"{run}/adapter", str(run), f"{tmp_path}/adapter", f"{tmp_path}/run", f"{run.name}/adapter")
    for name in names:
        text = text.replace(name, "FOLDER")
    return text


@pytest.mark.parametrize("command", [name for name, takes in TAKES.items() if takes])
def test_both_folders_do_the_same(command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rans = [said(command, folder, tmp_path, monkeypatch) for folder in (run, run / "adapter")]
    texts = [without_paths(ran.stdout or ran.stderr.partition("run of")[2], run, tmp_path) for ran in rans]
    texts = [re.sub(r"[0-9.]+( tokens/s)|(?<=econds\": )[0-9.]+", "", text) for text in texts]
    assert texts[0]
    assert texts[0] == texts[1]


def test_as_the_other_model_or_adapter(run: Path, tmp_path: Path) -> None:
    for folder in (run, run / "adapter"):
        compared = run_finetune("evaluate", run, "--compare", folder, *CPU, "--max-rows", 2, "--json")
        assert compared.status == 0, compared.stderr
        assert compared.document["comparison"]["models"][1]["max_logit_difference"] == 0
        answered = run_finetune("generate", run, "--against", folder, *ASK, *CPU, "--json")
        assert answered.status == 0, answered.stderr
        assert answered.document["answers"][0]["text"] == answered.document["against_answers"][0]["text"]
        out = tmp_path / f"with-{folder.name}"
        added = run_finetune("merge", run, "--with", f"{folder}=0.5", "--rows", 0, *CPU, "--output", out, "--json")
        assert added.status == 0, added.stderr
        assert [one["path"] for one in added.document["adapters"]] == [str(run / "adapter")] * 2
        # What `serve` and `chat` load.
        served = load_models(str(folder), {"other": str(folder)}, name=None, base=None, device="cpu")
        assert dict(served.selectors) == {"run": 1, "base": 0, "other": 2}


def test_a_run_that_was_moved_resumes_where_it_is(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "moved to a path with spaces"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "adapter")
    monkeypatch.chdir(tmp_path)
    ran = run_finetune("train", moved.name, "--resume")
    assert ran.status == 0, ran.stderr
    assert (moved / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_has_no_adapter_yet(run: Path, tmp_path: Path) -> None:
    cut_off = tmp_path / "cut off"
    shutil.copytree(run, cut_off)
    shutil.rmtree(cut_off / "adapter")
    says = (
        "the run has not come to its end, so there is no adapter in it",
        f"where: {cut_off}",
        f"fix: go on with it: finetune train '{cut_off}' --resume, or name a checkpoint of it",
        "/checkpoints/checkpoint-",
    )
    refused(tmp_path, "generate", cut_off, *ASK, says=says)
    refused(tmp_path, "merge", cut_off, "--output", tmp_path / "out", says=says)
    refused(tmp_path, "evaluate", cut_off, "--compare", "base", says=says)
