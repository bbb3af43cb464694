"""What `finetune evaluate --tasks` refuses before it looks for lm-evaluation-harness; scores are in tests/harness/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.running import refused


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, saved_adapter: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("finetune.evaluate.harness.find_spec", lambda name: None)
    says = ("lm-evaluation-harness is not installed", "pip install -e '.[harness]'")
    refused(tmp_path, "evaluate", saved_adapter, "--tasks", "hellaswag", says=says)


@pytest.mark.parametrize("limit", ["0", "-5", "1.5", "inf", "nan"])
def test_a_limit_that_is_no_number_of_examples(saved_adapter: Path, tmp_path: Path, limit: str) -> None:
    says = (f"{limit} is not a number of examples", "--limit", "a whole number from 1, or a share")
    refused(tmp_path, "evaluate", saved_adapter, "--tasks", "hellaswag", "--limit", limit, says=says)


@pytest.mark.parametrize("size", ["0", "many", "-1", "2.5"])
def test_a_batch_that_is_no_number(saved_adapter: Path, tmp_path: Path, size: str) -> None:
    says = (f"{size!r} is not a number of requests", "--batch-size", "a whole number from 1, or auto")
    refused(tmp_path, "evaluate", saved_adapter, "--tasks", "hellaswag", "--batch-size", size, says=says)


def test_the_largest_batch_of_a_cpu(saved_adapter: Path, tmp_path: Path) -> None:
    says = ("there is no GPU", "--batch-size auto", "give a number like 8")
    args = ("evaluate", saved_adapter, "--tasks", "hellaswag", "--batch-size", "auto", "--device", "cpu")
    refused(tmp_path, *args, says=says)


def test_paths_that_cannot_be_used(saved_adapter: Path, tmp_path: Path) -> None:
    args = ("evaluate", saved_adapter, "--tasks", "hellaswag")
    says = ("there is no such folder of tasks", f"--tasks-path {tmp_path / 'none'}")
    refused(tmp_path, *args, "--tasks-path", tmp_path / "none", says=says)
    refused(tmp_path, *args, "--output", tmp_path, says=("the file cannot be written", f"--output {tmp_path}"))


@pytest.mark.parametrize("option", [("--compare", "base"), ("--survival",), ("--data", "x"), ("--seed", "0")])
def test_options_of_held_out_conversations(saved_adapter: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    says = (f"{option[0]} does not go with --tasks", f"leave {option[0]} out, or run it apart, without --tasks")
    refused(tmp_path, "evaluate", saved_adapter, "--tasks", "hellaswag", *option, says=says)


@pytest.mark.parametrize("option", [("--limit", "5"), ("--apply-chat-template",), ("--output", "x")])
def test_options_of_benchmarks(saved_adapter: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    says = (f"{option[0]} belongs to --tasks", f"leave {option[0]} out, or name tasks with --tasks")
    refused(tmp_path, "evaluate", saved_adapter, *option, says=says)
