"""What is shown, where, and what is left behind when the process is killed."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from finetune.train.progress import ProgressCallback


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Plays a trainer's events to a callback, with a clock that only moves when told."""

    def __init__(self, console: Console | None = None, *, main: bool = True, steps: int = 100):
        self.clock = Clock()
        self.callback = ProgressCallback(console=console, clock=self.clock)
        self.state = TrainerState(max_steps=steps, global_step=0, is_world_process_zero=main)
        self.control = TrainerControl()

    def event(self, name: str, **kwargs: Any) -> None:
        getattr(self.callback, name)(None, self.state, self.control, **kwargs)

    def begin(self, step: int = 0) -> None:
        self.state.global_step = step
        self.event("on_train_begin")

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.state.global_step += 1
            self.event("on_step_end")

    def log(self, **logs: Any) -> dict[str, Any]:
        self.event("on_log", logs=logs)
        return logs

    def evaluate(self, batches: int, seconds: float, **metrics: Any) -> None:
        for _ in range(batches):
            self.clock.now += seconds
            self.event("on_prediction_step", eval_dataloader=range(batches))
        metrics = {"eval_loss": 1.5, "eval_runtime": batches * seconds, **metrics}
        self.event("on_log", logs=metrics)
        self.event("on_evaluate", metrics=metrics)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, force_interactive=True, legacy_windows=False)


def text_of(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_plain_lines_on_standard_error_and_nothing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    run.begin()
    run.steps(10, seconds=0.5)
    run.log(**{"loss": 2.345678, "learning_rate": 2e-4, "num_tokens": 10_000, "router/max_vio_worst": 0.314})
    run.evaluate(4, 0.5, **{"eval_router/max_vio_worst": 0.25})
    run.steps(10, seconds=0.5)
    run.log(loss=2.0, learning_rate=1e-4, num_tokens=30_000)
    run.log(train_runtime=12.0, train_loss=2.1)
    run.event("on_train_end")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train  step 10/100  loss 2.346  lr 2.00e-04  2,000 tok/s  MaxVio 0.31  0:45 left",
        "eval   step 10/100  loss 1.500  MaxVio 0.25  in 0:02",
        # 20,000 tokens in 5 s of training; the 2 s of evaluation count for the time left only.
        "train  step 20/100  loss 2.000  lr 1.00e-04  4,000 tok/s  0:48 left",
    ]


def test_tokens_per_second_leaves_out_evaluation_and_saving_and_is_logged() -> None:
    run = Run(Console(file=io.StringIO()))
    run.begin()
    run.steps(2, seconds=1.0)
    assert run.log(loss=1.0, num_tokens=1000)["tokens_per_second"] == pytest.approx(500)
    assert run.callback.tokens_per_second is None
    run.evaluate(3, seconds=7.0)
    run.clock.now += 11.0
    run.event("on_save")
    run.steps(2, seconds=1.0)
    assert run.log(loss=1.0, num_tokens=4000)["tokens_per_second"] == pytest.approx(1500)
    # That of the whole run is the same figure, without the first window.
    assert run.callback.tokens_per_second == pytest.approx(1500)
    run.steps(2, seconds=2.0)
    run.log(loss=1.0, num_tokens=5000)
    assert run.callback.tokens_per_second == pytest.approx(4000 / 6)
    # A trainer that does not count tokens shows no rate.
    run.steps(1, seconds=1.0)
    assert "tokens_per_second" not in run.log(loss=1.0)


def test_a_second_training_of_the_same_trainer_does_not_count_the_first_ones_tokens() -> None:
    run = Run(Console(file=io.StringIO()))
    run.begin()
    run.steps(1, seconds=1.0)
    run.log(loss=1.0, num_tokens=1000)
    run.event("on_train_end")
    run.begin()
    run.steps(1, seconds=1.0)
    assert run.log(loss=1.0, num_tokens=1300)["tokens_per_second"] == pytest.approx(300)


def test_time_left_after_resume_counts_only_the_steps_of_this_start() -> None:
    console = Console(file=io.StringIO(), width=120)
    run = Run(console)
    run.begin(step=90)
    run.steps(5, seconds=60.0)
    run.log(loss=1.0)
    assert console.file.getvalue().endswith("step 95/100  loss 1.000  5:00 left\n")
    run.state.max_steps = 1000
    run.log(loss=1.0)
    assert console.file.getvalue().endswith("15:05:00 left\n")


def test_a_long_evaluation_without_a_terminal_is_not_silent() -> None:
    console = Console(file=io.StringIO())
    run = Run(console)
    run.evaluate(5, seconds=20.0)
    assert console.file.getvalue().splitlines() == [
        "eval   batch 3/5",
        "eval   batch 5/5",
        "eval   step 0/100  loss 1.500  in 1:20",
    ]


@pytest.mark.parametrize("width", [50, 80, 160])
def test_bar_on_a_terminal(width: int) -> None:
    console = terminal(width)
    run = Run(console)
    run.begin()
    run.steps(10, seconds=0.5)
    run.log(**{"loss": 2.25, "learning_rate": 2e-4, "num_tokens": 10_000, "router/max_vio_worst": 0.314})
    run.steps(1, seconds=0.5)
    shown = text_of(console)
    assert "11/100" in shown
    assert "0:45 left" in shown
    assert "loss 2.250  lr 2.00e-04" in shown
    if width >= 80:
        assert "2,000 tok/s  MaxVio 0.31" in shown
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= width
    run.evaluate(4, 0.5)
    assert "4/4" in text_of(console)
    assert "eval   step 11/100  loss 1.500  in 0:02" in text_of(console)
    before_the_end = len(text_of(console))
    run.event("on_train_end")
    last = text_of(console)[before_the_end:]
    assert "11/100" in last
    assert "eval" not in last
    assert last.endswith("\n")


def test_an_exception_ends_the_bar_and_gives_standard_error_back() -> None:
    console, stderr = terminal(), sys.stderr
    run = Run(console)

    def interrupted() -> None:
        with run.callback:
            run.begin()
            run.steps(3, seconds=1.0)
            assert sys.stderr is not stderr
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is stderr
    assert text_of(console).endswith("\n")
    size = len(console.file.getvalue())
    run.callback.close()
    assert len(console.file.getvalue()) == size


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO())])
def test_other_processes_show_nothing_but_log_the_rate(console: Console) -> None:
    run = Run(console, main=False)
    run.begin()
    run.steps(10, seconds=0.5)
    assert run.log(loss=1.0, num_tokens=1000)["tokens_per_second"] == pytest.approx(200)
    run.evaluate(2, seconds=1.0)
    run.event("on_train_end")
    assert console.file.getvalue() == ""


def test_killed_in_a_terminal_leaves_the_cursor_and_the_modes_as_they_were() -> None:
    program = """
import time
from transformers import TrainerControl, TrainerState
from finetune.train.progress import ProgressCallback
callback, state = ProgressCallback(), TrainerState(max_steps=100, global_step=0)
callback.on_train_begin(None, state, TrainerControl())
while True:
    time.sleep(0.05)
    state.global_step = min(state.global_step + 1, 99)
    callback.on_step_end(None, state, TrainerControl())
    callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 120
    while b"loss 1.000" not in written and time.monotonic() < deadline:
        if select.select([ours], [], [], 1.0)[0]:
            written += os.read(ours, 65536)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    os.close(ours)
    assert b"loss 1.000" in written
    assert out == b""
    # Private modes (hidden cursor, alternate screen, mouse) would outlive the process.
    assert not re.search(rb"\x1b\[\?", written)
