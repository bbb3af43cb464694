"""What arrives in Weights & Biases, TensorBoard and trackio, read back from their files and held against metrics.jsonl.

One run writes to all three, in a process of its own, because wandb and trackio set hooks for the life of a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from finetune.jsonl import read_metrics
from finetune.recipe.load import load_recipe
from finetune.router.plots import load_heat_map_pixels
from finetune.train import loggers
from finetune.train.loggers import loggers_in_use
from tests.conftest import REPOSITORY
from tests.running import refused, run_finetune

Write = Callable[..., Path]
LAYERS, EXPERTS = 2, 4
# transformers' callbacks put these into the summary of a run, not into its history.
ONCE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


@dataclass(frozen=True)
class Logged:
    """A finished run."""

    root: Path
    stdout: str
    trackio: Path

    @property
    def scalars(self) -> dict[tuple[str, int], float]:
        """Every scalar of metrics.jsonl by the name it must have in a logger, and its step."""
        found = {}
        for line in read_metrics(self.root / "metrics.jsonl"):
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in ("step", "seconds"):
                    tag = "eval/" + name[5:] if name.startswith("eval_") else "train/" + name
                    found[tag, line["step"]] = value
        return found

    @property
    def history(self) -> dict[tuple[str, int], float]:
        return {(tag, step): value for (tag, step), value in self.scalars.items() if tag[6:] not in ONCE}

    def load(self, prefix: str, step: int) -> torch.Tensor:
        """[L, E] of the log at a step."""
        first = f"{prefix}router/layer_00/load"
        line = next(
            line for line in read_metrics(self.root / "metrics.jsonl") if line["step"] == step and first in line
        )
        loads = [line[f"{prefix}router/layer_{layer:02d}/load"] for layer in range(LAYERS)]
        return torch.tensor(loads, dtype=torch.float64)

    def pixels(self, prefix: str, step: int) -> np.ndarray:
        of = "training" if prefix == "" else "held-out"
        return load_heat_map_pixels(self.load(prefix, step), f"Expert load, {of}, step {step}")


# Training logs 1, 2 and 4 of 4, and the evaluation.
PICTURES = [("train", "", 1), ("train", "", 2), ("train", "", 4), ("eval", "eval_", 4)]


@pytest.fixture(scope="module")
def logged(small_mixtral: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Four steps and one evaluation, logged everywhere; no variable of a logger is set but trackio's folder."""
    folder = tmp_path_factory.mktemp("logged")
    recipe: dict[str, Any] = {
        "model": {"path": str(small_mixtral), "device": "cpu"},
        "data": {"train": str(conversations), "eval": str(conversations), "max_eval_rows": 8},
        "training": {"max_steps": 4, "logging_steps": 1, "max_length": 64, "save_strategy": "no"},
        "logging": {"wandb": "offline", "tensorboard": True, "trackio": True, "project": "watched", "run_name": "one"},
        "output": {"dir": str(folder / "run")},
    }
    recipe["training"] |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 4}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "train", str(folder / "recipe.yaml"), "--json"],
        cwd=REPOSITORY,
        env={**kept, "TRACKIO_DIR": str(folder / "trackio")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Logged(folder / "run", done.stdout, folder / "trackio")


def test_the_report_stays_alone_on_standard_output(logged: Logged) -> None:
    assert json.loads(logged.stdout)["steps"] == 4


# Weights & Biases: records of protobuf in the log format of LevelDB.


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Blocks of 32 KiB that hold pieces, each under checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_rows(root: Path) -> tuple[list[dict[str, Any]], Path]:
    """The history of the only run below `root`, and its folder of files."""
    (path,) = (root / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append(row := {})
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = row.setdefault(outer[0], {}) if outer else row
                inner[last] = json.loads(item.value_json)
    return rows, path.parent / "files"


def by_step(rows: list[dict[str, Any]]) -> dict[tuple[str, int], Any]:
    """Scalars of the rows by name and step."""
    return {
        (name, row["train/global_step"]): value
        for row in rows
        for name, value in row.items()
        if isinstance(value, (int, float)) and name.startswith(("train/", "eval/")) and name != "train/global_step"
    }


def test_wandb_offline_holds_every_scalar(logged: Logged) -> None:
    rows, _ = wandb_rows(logged.root)
    found = by_step(rows)
    assert found == logged.history
    assert ("train/router/max_vio_worst", 1) in found
    assert ("eval/router/max_vio_worst", 4) in found


def test_wandb_holds_histograms_and_heat_maps(logged: Logged) -> None:
    rows, files = wandb_rows(logged.root)
    for kind, prefix, step in PICTURES:
        (row,) = (row for row in rows if f"{kind}/router/load_map" in row and row["train/global_step"] == step)
        histogram = row[f"{kind}/router/utilization"]
        assert histogram["_type"] == "histogram"
        assert_holds(histogram["values"], histogram["bins"], logged.load(prefix, step) * EXPERTS)
        picture = np.asarray(Image.open(files / row[f"{kind}/router/load_map"]["path"]).convert("RGB"))
        assert np.array_equal(picture, logged.pixels(prefix, step))
    assert sum("train/router/load_map" in row for row in rows) == 3


def assert_holds(counts: list[int], edges: list[float], values: torch.Tensor) -> None:
    """A histogram against a count by hand."""
    assert sum(counts) == LAYERS * EXPERTS
    assert edges[0] == pytest.approx(values.min().item())
    assert edges[-1] == pytest.approx(values.max().item())
    for count, low, high in zip(counts[:-1], edges[:-2], edges[1:-1], strict=True):
        assert count == sum(low <= value < high for value in values.flatten().tolist())


@pytest.mark.parametrize(
    ("opened_before", "breaks", "ended"), [(False, False, [0]), (False, True, [1]), (True, True, [])]
)
def test_training_ends_the_wandb_run_that_it_opened(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, opened_before: bool, breaks: bool, ended: list[int]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(wandb, "finish", lambda exit_code: codes.append(exit_code))
    monkeypatch.setattr(wandb, "run", object() if opened_before else None)
    with (
        contextlib.suppress(KeyboardInterrupt),
        loggers_in_use(load_recipe(write_recipe(logging={"wandb": "offline"}))),
    ):
        monkeypatch.setattr(wandb, "run", object())
        if breaks:
            raise KeyboardInterrupt
    assert codes == ended


# TensorBoard: event files.


def events(root: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    accumulator = EventAccumulator(str(root / "tensorboard"), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def test_tensorboard_holds_every_scalar(logged: Logged) -> None:
    found = events(logged.root)
    values = {(tag, event.step): event.value for tag in found.Tags()["scalars"] for event in found.Scalars(tag)}
    assert values == {key: np.float32(value) for key, value in logged.scalars.items()}


def test_tensorboard_holds_histograms_and_heat_maps(logged: Logged, tmp_path: Path) -> None:
    found = events(logged.root)
    for kind, prefix, step in PICTURES:
        (image,) = (event for event in found.Images(f"{kind}/router/load_map") if event.step == step)
        (tmp_path / "image.png").write_bytes(image.encoded_image_string)
        picture = np.asarray(Image.open(tmp_path / "image.png").convert("RGB"))
        assert np.array_equal(picture, logged.pixels(prefix, step))
        (event,) = (event for event in found.Histograms(f"{kind}/router/utilization") if event.step == step)
        utilization = logged.load(prefix, step) * EXPERTS
        assert event.histogram_value.num == LAYERS * EXPERTS
        assert event.histogram_value.sum == pytest.approx(utilization.sum().item())
        assert event.histogram_value.max == pytest.approx(utilization.max().item())
    assert [event.step for event in found.Images("train/router/load_map")] == [1, 2, 4]


@pytest.mark.slow
def test_a_resumed_run_is_one_curve_in_tensorboard(write_recipe: Write, tmp_path: Path) -> None:
    """Steps after the checkpoint are taken and written twice; only the second time counts."""
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    recipe = write_recipe(logging={"tensorboard": True}, training=training, router={"figures": False})
    assert run_finetune("train", recipe).status == 0
    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = run_finetune("train", recipe, "--resume")
    assert resumed.status == 0, resumed.stderr
    assert len(list((run / "tensorboard").iterdir())) == 2
    found = events(run)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    expected = [(line["step"], np.float32(line["loss"])) for line in lines]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == expected
    assert found.Tags()["images"] == []  # router.figures: false
    assert [event.step for event in found.Histograms("train/router/utilization")] == [1, 2, 3, 4]


# trackio: rows of JSON in SQLite, pictures beside it.


def trackio_rows(database: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(database) as connection:
        return [json.loads(text) for (text,) in connection.execute("select metrics from metrics order by step")]


def test_trackio_holds_every_scalar(logged: Logged) -> None:
    assert by_step(trackio_rows(logged.trackio / "watched.db")) == logged.history
    with sqlite3.connect(logged.trackio / "watched.db") as connection:
        assert connection.execute("select distinct run_name from metrics").fetchall() == [("one",)]


def test_trackio_holds_histograms_and_heat_maps(logged: Logged) -> None:
    rows = trackio_rows(logged.trackio / "watched.db")
    for kind, prefix, step in PICTURES:
        (row,) = (row for row in rows if f"{kind}/router/load_map" in row and row["train/global_step"] == step)
        histogram = row[f"{kind}/router/utilization"]
        assert histogram["_type"] == "trackio.histogram"
        assert_holds(histogram["values"], histogram["bins"], logged.load(prefix, step) * EXPERTS)
        path = logged.trackio / "media" / row[f"{kind}/router/load_map"]["file_path"]
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), logged.pixels(prefix, step))


def test_an_error_ends_the_run_in_trackio(write_recipe: Write) -> None:
    import trackio

    def train() -> None:
        with loggers_in_use(load_recipe(write_recipe(logging={"trackio": True}))):
            trackio.init(project="broken", auto_log_cpu=False)
            trackio.log({"loss": 1.5})
            raise RuntimeError("training broke")

    with pytest.raises(RuntimeError, match="training broke"):
        train()
    assert trackio.context_vars.current_run.get() is None
    assert [row["loss"] for row in trackio_rows(Path(os.environ["TRACKIO_DIR"]) / "broken.db")] == [1.5]


# What is refused.


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_logger_that_is_not_installed(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == package else object())
    # There is no model: the refusal comes before anyone looks for it.
    recipe = write_recipe(logging={package: True}, model={"path": str(tmp_path / "none")})
    says = (
        f"the package {package} is not installed",
        f"where: logging.{package}: true",
        f"fix: pip install -e '.[loggers]', or set logging.{package}=false",
    )
    refused(tmp_path, "train", recipe, says=says)


def test_the_extra_that_the_message_names_exists() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["name"] == "moe-qlora"
    assert {name.split(">")[0] for name in project["optional-dependencies"]["loggers"]} == {"tensorboard", "trackio"}


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "yes"), ("trackio", 1)])
def test_the_keys_are_strict(write_recipe: Write, tmp_path: Path, key: str, value: object) -> None:
    recipe = write_recipe(logging={key: value})
    refused(tmp_path, "recipe", "show", recipe, says=(f"logging.{key}",))
