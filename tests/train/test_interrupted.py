"""Full disks, kills and interrupts: what was being written is not there afterwards, and a run goes on where it was.

The errors are those that safetensors and torch raise on a file system without space, put in place of the call that
raised them; the signals are real.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from finetune.disk import folder_bytes
from finetune.export import writing
from finetune.memory.needs import disk_bytes
from tests.conftest import REPOSITORY
from tests.running import contents, refused, run_finetune

Write = Callable[..., Path]
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
NO_SPACE = "no space left on the disk"


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


# ---- no space -------------------------------------------------------------------------------------------------


def test_too_little_space_is_refused_before_anything_is_written(
    write_recipe: Write, small_mixtral: Path, saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe("second.yaml", output={"dir": str(tmp_path / "new" / "run")}, training=SAVES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    says = ("no space left for the run's checkpoints and adapter: it takes about ", "the disk has 1 MiB free")
    refused(tmp_path, "train", recipe, says=(*says, f"where: {tmp_path / 'new' / 'run'}", "fix: free some space"))
    out = ("--output", tmp_path / "out", "--device", "cpu")
    says = ("no space left for the quantized model: it takes about 4 MiB", f"where: {tmp_path / 'out'}", "free some")
    refused(tmp_path, "quantize", small_mixtral, *out, says=says)
    says = ("no space left for the merged model: it takes about ", "the disk has 1 MiB free", "another disk")
    refused(tmp_path, "merge", saved_adapter, *out, says=says)


def test_a_disk_that_fills_up_leaves_no_half_a_model(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: PreTrainedModel, folder: Path, **kwargs: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half a model")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    out = tmp_path / "out"
    says = (NO_SPACE, f"where: {out}", "free some space, or choose another output folder")
    refused(tmp_path, "quantize", small_mixtral, "--output", out, "--device", "cpu", says=says)

    def full(tensors: object, file: Path, **kwargs: object) -> None:
        file.write_bytes(b"half a shard")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writing, "save_file", full)
    ran = run_finetune("merge", saved_adapter, "--output", out, "--device", "cpu")
    assert ran.status == 2
    assert all(words in ran.stderr for words in says)
    assert not out.exists()


def test_a_disk_that_fills_up_at_a_checkpoint(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-written checkpoint gives its space back, and the run continues from the one before.

    The estimate that had let it begin is compared with what the whole run wrote.
    """
    save, estimates = torch.save, []

    def full(value: object, file: object, **kwargs: object) -> None:
        if "checkpoint-4/optimizer.pt" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(value, file, **kwargs)

    def estimate(*args: Any) -> int:
        estimates.append(disk_bytes(*args))
        return estimates[-1]

    lora = {"r": 256}  # so that weights and not the tokenizer fill the disk
    recipe = write_recipe(training=SAVES, trainable={"lora": lora}, router={"figures": False})
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("finetune.train.run.disk_bytes", estimate)
        patched.setattr(torch, "save", full)
        ran = run_finetune("train", recipe)
    assert ran.status == 2
    assert f"{NO_SPACE}\n  where: {run}/checkpoints/checkpoint-4\n" in ran.stderr
    assert "free some space; the run then continues with --resume" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [folder.name for folder in run.glob("checkpoints/*-*")] == ["checkpoint-2"]
    assert not list(run.rglob("*.partial"))
    assert not (run / "adapter").exists()

    resumed = run_finetune("train", recipe, "--resume")
    assert resumed.status == 0, resumed.stderr
    assert "checkpoint-2" in resumed.stdout
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert len(list(run.glob("checkpoints/*-*"))) == 3
    assert folder_bytes(run) < estimates[0] < 2 * folder_bytes(run)


# ---- kill and interrupt ---------------------------------------------------------------------------------------


def test_a_killed_merge_leaves_nothing_of_its_name(saved_adapter: Path, tmp_path: Path) -> None:
    code = """
import os, signal
from finetune.export import writing
save, count = writing.save_file, 0
def cut(tensors, file, **kwargs):
    global count
    count += 1
    if count > 5:
        file.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, file, **kwargs)
writing.save_file = cut
from finetune.cli import main
main()
"""
    merged, before = tmp_path / "merged", contents(saved_adapter)
    merge = ("merge", str(saved_adapter), "--output", str(merged), "--device", "cpu", "--shard-size", "20KB")
    killed = subprocess.run([sys.executable, "-c", code, *merge], cwd=REPOSITORY, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not merged.exists()
    (half,) = tmp_path.glob(".merged.*.partial")
    assert len(list(half.glob("model-*.safetensors"))) == 5
    assert contents(saved_adapter) == before
    # What is left behind is resumed.
    again = run_finetune(*merge, "--json")
    assert again.status == 0
    whole = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    assert 0 < again.document["made_bytes"] < whole - 32000 * 64 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not list(merged.glob(".*"))


def test_an_interrupted_merge_says_how_it_goes_on(
    saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    merge = ("merge", saved_adapter, "--output", tmp_path / "merged", "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr("finetune.export.run_merge", interrupted)
        stopped = run_finetune(*merge)
    assert (stopped.status, stopped.stderr) == (130, "interrupted\n"), "nothing is there yet"
    with monkeypatch.context() as patched:
        patched.setattr(writing, "save_file", interrupted)
        stopped = run_finetune(*merge)
    assert stopped.status == 130
    assert stopped.stderr.endswith("interrupted; the same command goes on from what is there\n")
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "merged").exists()


def test_online_logging_without_an_account(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "online", "DIR": str(tmp_path), "PROJECT": "none", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    recipe = write_recipe(logging={"wandb": "online"}, training={"max_steps": 1}, router={"figures": False})
    ran = run_finetune("train", recipe)
    assert ran.status == 2
    for words in ("Weights & Biases cannot be used: ", "logging.wandb: online", "WANDB_API_KEY", "Traceback"):
        assert (words in ran.stderr) is (words != "Traceback")
