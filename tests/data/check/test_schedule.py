"""Steps, time and cost, against arithmetic by hand over made-up and recorded speeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.checkpoint.json_file import read_json
from finetune.data.check import report as module
from finetune.data.check.report import nearest_speed, schedule
from finetune.data.check.words import time
from finetune.errors import ModelError
from finetune.moe.arch import MoeArch
from finetune.recipe.load import load_recipe

SHAPE = Path(__file__).parents[3] / "recipes" / "mixtral-8x7b"


def recipe(*settings: str):
    return load_recipe(SHAPE / "qlora-attention-80gb.yaml", [f"model.path={SHAPE / 'shape'}", *settings])


def record(folder: Path, *changes: dict) -> Path:
    arch = MoeArch.from_config(read_json(SHAPE / "shape" / "config.json", kind=ModelError), where="shape")
    about = {
        "device": "a GPU",
        "model_type": "mixtral",
        "parameters": arch.total_params,
        "method": "attention_lora",
        "batch": 2,
        "length": 1024,
        "tokens_per_step": 2048,
        "tokens_per_second": 5000.0,
    }
    file = folder / "speeds.json"
    file.write_text(json.dumps([about | change for change in changes]), encoding="utf-8")
    return file


def test_the_nearest_size_of_the_same_model_and_method_speaks(tmp_path, monkeypatch):
    recorded = record(
        tmp_path,
        {},
        {"tokens_per_step": 16384, "tokens_per_second": 9000.0},
        {"parameters": 7, "tokens_per_second": 2.0},
        {"method": "non_moe", "tokens_per_second": 3.0},
        {"device": "my GPU", "tokens_per_step": 2**20, "tokens_per_second": 700.0},
    )

    def speed(tokens_per_step: int) -> tuple[float, str, bool]:
        found = nearest_speed(recipe(), tokens_per_step=tokens_per_step, recorded=recorded)
        return found.tokens_per_second, found.device, found.here

    assert speed(2048) == (5000, "a GPU", False)
    assert speed(9000) == (9000, "a GPU", False)
    # That of the GPU at hand says more than that of another size.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "my GPU")
    assert speed(2048) == (700, "my GPU", True)
    other = recipe("trainable.method=non_moe", "quantization.attention=16bit")
    assert nearest_speed(other, tokens_per_step=1, recorded=record(tmp_path, {})) is None


def test_hours_and_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(module.nearest_speed, "__kwdefaults__", {"recorded": record(tmp_path, {})})
    found = schedule(
        recipe("training.num_train_epochs=3", "training.gradient_accumulation_steps=4"),
        batches=500,
        tokens_per_epoch=1_024_000,
        price_per_hour=2.5,
    )
    assert (found["steps"], found["epochs"]) == (3 * 125, 3)
    assert found["hours"] == pytest.approx(3 * 1_024_000 / 5000 / 3600)
    assert found["cost"] == pytest.approx(2.5 * found["hours"])
    # Never a time without the device that it is of.
    assert dict(time(found))["time"] == "11 min on a GPU, not measured on a GPU of this machine"
    assert dict(time(found | {"device_is_here": True}))["time"] == "11 min on a GPU"
    assert dict(time(found))["speed"] == "5,000 tokens/s, measured on a GPU at 2 x 1024 tokens"


def test_the_recorded_speeds_are_those_of_the_bench():
    lines = [
        json.loads(text)
        for path in (SHAPE.parents[1] / "bench" / "results").rglob("*.json")
        for text in path.read_text(encoding="utf-8").splitlines()
    ]
    measured = [line for line in lines if line["bench"] == "train" and not line["overrides"]]
    recorded = json.loads(module._RECORDED.read_text(encoding="utf-8"))
    names = ("device", "model_type", "parameters", "method", "batch", "length", "tokens_per_step")
    expected = [
        {name: line[name] for name in names} | {"tokens_per_second": line["trainer"]["tokens_per_second"]}
        for line in measured
    ]
    assert sorted(recorded, key=str) == sorted(expected, key=str)


def test_max_steps():
    limited = schedule(recipe("training.max_steps=10"), batches=500, tokens_per_epoch=1_024_000)
    assert (limited["steps"], limited["epochs"]) == (10, 10 / 500)
