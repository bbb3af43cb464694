"""Steps, time and cost, against arithmetic by hand over made-up and recorded speeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.arch import MoeArch
from finetune.checkpoint import read_json
from finetune.datacheck import schedule as module
from finetune.datacheck.schedule import nearest_speed, schedule
from finetune.errors import ModelError
from finetune.recipe import load_recipe

SHAPE = Path(__file__).parents[2] / "recipes" / "mixtral-8x7b"


def recipe(*settings: str):
    return load_recipe(SHAPE / "qlora-attention-80gb.yaml", [f"model.path={SHAPE / 'shape'}", *settings])


def line(folder: Path, name: str, **changes) -> None:
    arch = MoeArch.from_config(read_json(SHAPE / "shape" / "config.json", kind=ModelError), where="shape")
    about = {
        "bench": "train",
        "model_type": "mixtral",
        "parameters": arch.total_params,
        "method": "attention_lora",
        "device": "a GPU",
        "batch": 2,
        "length": 1024,
        "tokens_per_step": 2048,
        "overrides": [],
        "trainer": {"tokens_per_second": 5000.0},
    }
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(about | changes) + "\n", encoding="utf-8")


def test_the_nearest_size_of_the_same_model_and_method_speaks(tmp_path):
    line(tmp_path, "small.json")
    line(tmp_path, "large.json", tokens_per_step=16384, trainer={"tokens_per_second": 9000.0})
    line(tmp_path, "budget.json", overrides=["memory.budget_gib=34"], trainer={"tokens_per_second": 1.0})
    line(tmp_path, "other.json", parameters=7, trainer={"tokens_per_second": 2.0})
    line(tmp_path, "method.json", method="non_moe", trainer={"tokens_per_second": 3.0})
    line(tmp_path, "peers.json", bench="peers", trainer={"tokens_per_second": 4.0})
    assert nearest_speed(recipe(), tokens_per_step=2048, folder=tmp_path).tokens_per_second == 5000
    assert nearest_speed(recipe(), tokens_per_step=9000, folder=tmp_path).tokens_per_second == 9000
    assert nearest_speed(recipe(), tokens_per_step=2048, folder=tmp_path / "none") is None


def test_hours_and_cost(tmp_path, monkeypatch):
    line(tmp_path, "small.json")
    monkeypatch.setattr(module.nearest_speed, "__kwdefaults__", {"folder": tmp_path})
    found = schedule(
        recipe("training.num_train_epochs=3", "training.gradient_accumulation_steps=4"),
        batches=500,
        tokens_per_epoch=1_024_000,
        price_per_hour=2.5,
    )
    assert (found["steps"], found["epochs"]) == (3 * 125, 3)
    assert found["hours"] == pytest.approx(3 * 1_024_000 / 5000 / 3600)
    assert found["cost"] == pytest.approx(2.5 * found["hours"])
    assert found["measured_by"].startswith("a GPU, 2 x 1024")


def test_the_recorded_speeds_of_mixtral_are_found():
    found = nearest_speed(recipe(), tokens_per_step=8192)
    assert found is not None
    assert "H100" in found.by
    assert "8 x 1024" in found.by


def test_max_steps():
    limited = schedule(recipe("training.max_steps=10"), batches=500, tokens_per_epoch=1_024_000)
    assert (limited["steps"], limited["epochs"]) == (10, 10 / 500)
