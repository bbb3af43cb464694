"""The metrics file: strict JSON, one line per log, consistent after any crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState

from finetune.errors import OutputError
from finetune.jsonl import JsonlCallback, read_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def log(callback: JsonlCallback, step: int, main: bool = True, **logs: Any) -> None:
    state = TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)
    callback.on_log(None, state, TrainerControl(), logs=logs)


def begin(callback: JsonlCallback, step: int = 0, main: bool = True) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=main)
    callback.on_train_begin(None, state, TrainerControl())


def lines(path: Path) -> list[dict[str, Any]]:
    """Read by another parser than the module's own reader, and strictly."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_line_per_log_with_step_epoch_and_seconds(tmp_path: Path) -> None:
    path, clock, loads = tmp_path / "run" / "metrics.jsonl", Clock(), {"router/layer_00/load": [0.25, 0.75]}
    callback = JsonlCallback(path, extra=[lambda: loads], clock=clock)
    begin(callback)
    clock.now += 2.5
    log(callback, 10, loss=2.5, learning_rate=1e-4)
    loads = {}
    clock.now += 1.0
    log(callback, 10, eval_loss=2.25)
    assert lines(path) == [
        {
            "step": 10,
            "epoch": 1.0,
            "seconds": 2.5,
            "loss": 2.5,
            "learning_rate": 1e-4,
            "router/layer_00/load": [0.25, 0.75],
        },
        {"step": 10, "epoch": 1.0, "seconds": 3.5, "eval_loss": 2.25},
    ]
    assert read_metrics(path) == lines(path)


def test_non_finite_numbers_become_null_and_numpy_becomes_json(tmp_path: Path) -> None:
    callback = JsonlCallback(tmp_path / "m.jsonl")
    begin(callback)
    log(
        callback,
        1,
        loss=float("nan"),
        grad_norm=float("inf"),
        vector=[1.0, float("-inf")],
        single=np.float32(0.5),
        count=np.int64(3),
        flag=True,
        note="NaN",
    )
    (line,) = lines(tmp_path / "m.jsonl")
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["vector"] == [1.0, None]
    assert (line["single"], line["count"], line["flag"], line["note"]) == (0.5, 3, True, "NaN")


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    callback = JsonlCallback(tmp_path / "m.jsonl")
    begin(callback, main=False)
    log(callback, 1, main=False, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_resume_drops_what_will_run_again_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    path, clock = tmp_path / "m.jsonl", Clock()
    first = JsonlCallback(path, clock=clock)
    begin(first)
    for step in (10, 20, 30):
        clock.now += 5.0
        log(first, step, loss=float(step))
    with path.open("a") as file:  # killed while writing
        file.write('{"step": 40, "epoch": 4.0, "lo')

    second = JsonlCallback(path, clock=Clock())
    begin(second, step=20)
    log(second, 30, loss=31.0)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert [line["seconds"] for line in lines(path)] == [5.0, 10.0, 10.0]
    assert [child.name for child in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_cut_line_without_a_newline_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10, "epoch": 1.0, "seconds": 1.0, "loss": 1.0}\n{"step": 2')
    assert [line["step"] for line in read_metrics(path)] == [10]
    callback = JsonlCallback(path)
    begin(callback, step=10)
    log(callback, 20, loss=2.0)
    assert [line["step"] for line in lines(path)] == [10, 20]


def test_a_fresh_run_does_not_continue_an_old_file_but_keeps_an_evaluation_before_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "epoch": 0, "seconds": 0.0, "eval_loss": 9.0}\n')
    callback = JsonlCallback(path)
    begin(callback)
    assert lines(path) == []

    path.unlink()
    callback = JsonlCallback(path)
    log(callback, 0, eval_loss=3.0)
    begin(callback)
    log(callback, 10, loss=2.0)
    assert [line["step"] for line in lines(path)] == [0, 10]


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk\n" * 3)
    with pytest.raises(OutputError) as caught:
        begin(JsonlCallback(path), step=20)
    message = str(caught.value)
    assert "holds something else than metrics" in message
    assert "notes.txt, line 1: 'remember the milk'" in message
    assert "choose another output.dir" in message
    assert path.read_text() == "remember the milk\n" * 3


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.mkdir()
    for failing in (lambda c: begin(c), lambda c: log(c, 1, loss=1.0)):
        with pytest.raises(OutputError) as caught:
            failing(JsonlCallback(path))
        message = str(caught.value)
        assert "the metrics file cannot be written: Is a directory" in message
        assert str(path) in message
        assert "then resume" in message


def test_no_space_left_says_so() -> None:
    with pytest.raises(OutputError) as caught:
        log(JsonlCallback("/dev/full"), 1, loss=1.0)
    assert "the metrics file cannot be written: No space left on device" in str(caught.value)
