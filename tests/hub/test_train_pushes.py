"""`output.push_to_hub`: the run itself pushes at its end, from one process, and asks before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.conftest import REPOSITORY
from tests.hub.stand_in import TOKEN, USER, StandIn
from tests.running import run_finetune

REPO = f"{USER}/tuned"
_SHORT = {"max_steps": 2, "logging_steps": 1}


@pytest.mark.slow
def test_a_run_pushes_its_adapter_at_the_end(hub: StandIn, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    output = {"push_to_hub": {"repo_id": "tuned", "private": True, "branch": "first"}}
    ran = run_finetune("train", write_recipe(output=output, training=_SHORT), "--json")
    assert ran.status == 0, ran.stderr
    repo = hub.repos[REPO]
    assert repo.private
    assert ran.document["pushed"]["commit"] == repo.branches["first"]
    files = repo.files("first")
    assert files["adapter_model.safetensors"] == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    fingerprint = run_finetune("adapter", "inspect", tmp_path / "run/adapter", "--json").document["data"]["fingerprint"]
    assert fingerprint in ModelCard(files["README.md"].decode()).text
    assert TOKEN not in ran.stdout + ran.stderr
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in (tmp_path / "run").glob("*.*"))


@pytest.mark.parametrize(
    ("rights", "says"),
    [({"role": "read"}, "the token may only read"), (None, "the hub does not accept the token (401)")],
    ids=["may not write", "expired"],
)
def test_a_token_that_will_not_do_is_said_before_anything_is_loaded(
    hub: StandIn, write_recipe: Callable[..., Path], tmp_path: Path, rights: dict[str, str] | None, says: str
) -> None:
    hub.tokens = {} if rights is None else {TOKEN: rights}
    # There is no such model: reading it would be the next fault.
    recipe = write_recipe(output={"push_to_hub": {"repo_id": "tuned"}}, model={"path": str(tmp_path / "nowhere")})
    ran = run_finetune("train", recipe)
    assert ran.status == 2
    assert says in ran.stderr
    assert [path for _, path in hub.requests] == ["/api/whoami-v2"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_is_trained_survives_a_push_that_fails(
    hub: StandIn, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    hub.fail("POST", "/commit/", status=403, says="storage is full")
    ran = run_finetune("train", write_recipe(output={"push_to_hub": {"repo_id": "tuned"}}, training=_SHORT))
    assert ran.status == 2
    assert "the token has no right to upload the files (403): storage is full" in ran.stderr
    hub.faults.clear()
    again = run_finetune("push", tmp_path / "run", "--repo-id", "tuned")
    assert again.status == 0, again.stderr
    assert "adapter_model.safetensors" in hub.repos[REPO].files()


@pytest.mark.slow
def test_two_processes_push_once(
    hub: StandIn, environment: dict[str, str], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(output={"push_to_hub": {"repo_id": "tuned"}}, training=_SHORT)
    config = REPOSITORY / "accelerate_configs" / "cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launch, str(REPOSITORY / "scripts" / "train.py"), str(recipe)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (hub.count("GET", "whoami"), hub.count("POST", "/commit/")) == (2, 1)
    assert hub.repos[REPO].messages == ["initial commit", "LoRA adapter by moe-qlora"]
