"""Pulling over real HTTP: a pinned commit, hashes, nothing that runs code, and going on after a cut."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from tests.hub.stand_in import TOKEN, USER, StandIn, blob_id
from tests.running import refused, run_finetune

REPO = f"{USER}/tuned"
WEIGHTS = save({"x": torch.arange(60_000, dtype=torch.float32)})
FILES = {
    "README.md": b"# Tuned\n",
    "adapter_config.json": b'{"peft_type": "LORA", "auto_mapping": null}',
    "adapter_model.safetensors": WEIGHTS,
    "figures/training.png": b"P" * 300,
}


def pull(output: Path, *options: object) -> dict[str, object]:
    ran = run_finetune("pull", REPO, "--output", output, "--json", *options)
    assert ran.status == 0, ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    return ran.document


def test_a_whole_commit_comes_and_is_recorded(hub: StandIn, tmp_path: Path) -> None:
    commit = hub.add(REPO, FILES, private=True)
    document = pull(tmp_path / "out")
    assert (document["commit"], document["left_out"]) == (commit, [])
    got = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    record = json.loads(got.pop("pulled.json"))
    assert got == FILES
    assert record["commit"] == commit
    assert record["files"]["adapter_model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert record["files"]["README.md"] == blob_id(FILES["README.md"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_revision_is_a_branch_or_a_commit(hub: StandIn, tmp_path: Path) -> None:
    first = hub.add(REPO, FILES)
    newer = FILES | {"README.md": b"# Newer\n"}
    repo = hub.repos[REPO]
    second = hub.commit(repo, "rank-16", newer, "newer")
    assert pull(tmp_path / "a", "--revision", "rank-16")["commit"] == second
    assert pull(tmp_path / "b", "--revision", first)["commit"] == first
    assert (tmp_path / "a" / "README.md").read_text() == "# Newer\n"
    assert (tmp_path / "b" / "README.md").read_text() == "# Tuned\n"
    says = ("no such revision", "name a branch, a tag or a commit")
    refused(tmp_path, "pull", REPO, "--revision", "gone", "--output", tmp_path / "c", says=says)


def test_what_may_run_code_is_left_out(hub: StandIn, tmp_path: Path) -> None:
    unsafe = {"training_args.bin": b"\x80", "old/pytorch_model.pt": b"\x80", "modeling_x.py": b"1", "x.pkl": b"\x80"}
    hub.add(REPO, FILES | unsafe)
    assert pull(tmp_path / "safe")["left_out"] == sorted(unsafe)
    assert not [path for path in (tmp_path / "safe").rglob("*") if path.name in {Path(name).name for name in unsafe}]
    asked = [path for method, path in hub.requests if "/resolve/" in path]
    assert not [path for path in asked if path.endswith(tuple(unsafe))]
    assert pull(tmp_path / "all", "--allow-unsafe")["left_out"] == []
    assert (tmp_path / "all" / "modeling_x.py").read_bytes() == b"1"


def test_only_pickled_weights_are_refused(hub: StandIn, tmp_path: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    says = ("no safetensors weights; pytorch_model.bin may run code", REPO, "--allow-unsafe")
    refused(tmp_path, "pull", REPO, "--output", tmp_path / "out", says=says)
    hub.repos.clear()
    hub.add(REPO, {"README.md": b""})
    refused(tmp_path, "pull", REPO, "--output", tmp_path / "out", says=("holds no weights", "--revision"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_that_names_code_is_refused(hub: StandIn, tmp_path: Path, name: str) -> None:
    config = json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}).encode()
    hub.add(REPO, {"model.safetensors": WEIGHTS, name: config})
    says = (f"{name} names code of the repository to run (auto_map)", "--allow-unsafe")
    refused(tmp_path, "pull", REPO, "--output", tmp_path / "out", says=says)
    pull(tmp_path / "out", "--allow-unsafe")


def test_a_file_that_is_not_what_its_hash_says_is_refused(hub: StandIn, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    honest, hub.spoil = hub.spoil, lambda content: content[:-1] + b"!"
    for name in ("adapter_model.safetensors", "README.md"):
        hub.commit(hub.repos[REPO], "main", {"x.safetensors": WEIGHTS, name: FILES[name]}, name)
        ran = run_finetune("pull", REPO, "--output", tmp_path / "out")
        assert ran.status == 2
        assert re.search(r"\S+ is not what the commit names: its hash is [0-9a-f]{12}, not [0-9a-f]{12}", ran.stderr)
        assert not (tmp_path / "out").exists()
    hub.spoil = honest
    pull(tmp_path / "out")


def test_a_folder_that_holds_something_is_refused(hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(tmp_path, "pull", REPO, "--output", tmp_path / "out", says=("the output folder is not empty",))
    assert hub.requests == []


def test_nothing_there_or_not_for_you(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("pull", REPO, "--output", tmp_path / "out")
    refused(tmp_path, *args, says=("no such repository that you may read", REPO, "hf auth login"))
    hub.add(REPO, FILES, private=True)
    monkeypatch.delenv("HF_TOKEN")
    refused(tmp_path, *args, says=("no such repository that you may read", REPO, "hf auth login"))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "hf_expired" not in refused(tmp_path, *args, says=("does not accept the token (401)",)).stderr
    refused(tmp_path, "pull", "a/b/c", "--output", tmp_path / "out", says=("cannot be the name of a repository",))


def test_a_cut_file_is_fetched_from_where_it_was_cut(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add(REPO, FILES)
    hub.fail("GET", r"\.safetensors", times=1, cut_after=100_000)
    pull(tmp_path / "out")
    (first,) = hub.ranges
    assert 90_000 < first <= 100_000
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_pull_goes_on_in_another_process(hub: StandIn, environment: dict[str, str], tmp_path: Path) -> None:
    """The second file of weights does not come; the next `finetune pull` asks for that file only."""
    other = save({"y": torch.arange(70_000, dtype=torch.float32)})
    commit = hub.add(REPO, FILES | {"more.safetensors": other})
    hub.fail("GET", "more", status=403, says="not now")
    command = [sys.executable, "-m", "finetune", "pull", REPO, "--output", str(tmp_path / "out")]
    cut = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert cut.returncode == 2, cut.stderr
    assert "error: the token has no right to download the files (403): not now" in cut.stderr
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.requests.clear()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, content in {"adapter_model.safetensors": WEIGHTS, "more.safetensors": other}.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert json.loads((tmp_path / "out" / "pulled.json").read_text())["commit"] == commit
    assert [path for method, path in hub.requests if "/resolve/" in path and method == "GET"] == [
        f"/{REPO}/resolve/{commit}/more.safetensors"
    ]
    assert TOKEN not in cut.stdout + cut.stderr + done.stdout + done.stderr
