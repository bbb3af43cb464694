"""The stand-in as a fixture: the client in this process talks to it, as if HF_ENDPOINT had been set from the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.stand_in import TOKEN, StandIn


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A hub without repositories; the token of this machine may write."""
    with StandIn() as stand_in:
        # The client reads its environment once, when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in


@pytest.fixture
def environment(hub: StandIn, tmp_path: Path) -> dict[str, str]:
    """Variables that make a process of its own talk to the stand-in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture
def finished_run(saved_adapter: Path, small_mixtral: Path, tmp_path: Path) -> Path:
    """The folder of a run as it looks at the end, with what must never leave it; made without training."""
    from finetune.recipe.load import resolved_yaml
    from finetune.recipe.origin import provenance
    from finetune.recipe.schema import Recipe

    run = tmp_path / "somewhere-private" / "run"
    shutil.copytree(saved_adapter, run / "adapter")
    given = {
        "model": {"path": str(small_mixtral)},
        "trainable": {"lora": {"r": 4}},
        "data": {"train": "HuggingFaceH4/no_robots", "eval": str(tmp_path / "held-out.jsonl")},
        "output": {"dir": str(run), "push_to_hub": {"repo_id": "ada/earlier"}},
    }
    recipe = Recipe.model_validate(given)
    source = {"where": "HuggingFaceH4/no_robots, split train", "form": "messages", "used": 32}
    part = {"sources": [source], "examples": 32, "tokens": 900, "supervised_share": 0.4, "fingerprint": "f" * 32}
    files = {
        "run.json": {"recipe": recipe.model_dump(mode="json"), **provenance()},
        "data.json": {"parts": [part], "template": "mistral-v1", "loss_on": "all"},
        "summary.json": {
            "output": str(run),
            "steps": 8,
            "stopped_by": None,
            "train_loss": 5.4,
            "eval_loss_first": 6.0,
            "eval_loss_last": 5.0,
            "eval_step_last": 8,
            "tokens_per_second": 400.0,
            "peak_device_bytes": None,
            "trainable_parameters": 6144,
        },
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    (run / "recipe.yaml").write_text(resolved_yaml(recipe))
    steps = [{"step": step, "loss": 6.0 - step / 8, "epoch": 0.1, "seconds": 1.0} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    # Never to go: state of the optimizer, pickles, keys, logs, and whatever else people leave behind.
    for name in (
        "adapter/training_args.bin",
        "checkpoints/checkpoint-8/optimizer.pt",
        "adapter/.env",
        "adapter/id_rsa",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"HF_TOKEN={TOKEN}")
    (run / "adapter" / "log.txt").write_text(str(run))
    (run / "adapter" / "chat_template.json").symlink_to(run / "run.json")
    return run
