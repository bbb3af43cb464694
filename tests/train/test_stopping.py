"""Runs that end before their last step: signals, and steps whose loss or gradient is NaN or infinite.

Truth: an optimizer that was simply not asked to step, rows read from the file by hand, real signals.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState
from trl import SFTTrainer

from finetune.errors import FinetuneError
from finetune.signals import Interrupted, Signals
from finetune.train.stopping import Stopping, rows_of
from finetune.train.trainer import MoeTrainer
from tests.conftest import REPOSITORY
from tests.running import contents, run_finetune

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A test runner may ignore a signal."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


# ---- updates that are not applied -------------------------------------------------------------------------------


class Training:
    """Plays a trainer's steps to the callback, on a weight of one row."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], device: str = "cpu"):
        self.model = nn.Linear(3, 1, bias=False, device=device)
        self.optimizer = make(self.model.parameters())
        self.told: list[str] = []
        self.stopping = Stopping(Signals(), tell=self.told.append, rows=lambda rows: [f"row {row[0]}" for row in rows])
        self.state, self.control = TrainerState(max_steps=100, global_step=0), TrainerControl()

    def step(self, gradient: float, loss: float = 1.0) -> None:
        number = self.state.global_step + 1
        self.stopping.begin([{"input_ids": torch.tensor([[number, 7]])}])
        weight = self.model.weight
        self.stopping.loss(torch.full((), loss, device=weight.device))
        weight.grad = torch.full_like(weight, gradient)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.stopping.gradient(norm, self.optimizer, self.model.parameters())
        self.optimizer.step()
        self.stopping.on_optimizer_step(None, self.state, self.control)  # type: ignore[arg-type]
        self.state.global_step = number
        self.stopping.on_step_end(None, self.state, self.control, model=self.model)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: torch.optim.SGD(p, lr=0.1, fused=True)]
)
def test_a_fused_optimizer_is_as_if_it_had_not_stepped(make: Callable[[Any], Any], broken: float) -> None:
    run = Training(make)
    for _ in range(3):
        run.step(1.0)
    weight, state = run.model.weight.detach().clone(), copy.deepcopy(run.optimizer.state_dict())
    run.step(broken)
    assert torch.equal(run.model.weight, weight)
    after = run.optimizer.state_dict()
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][0][name]))
        for name, value in state["state"].get(0, {}).items()
        if value is not None
    )
    assert run.stopping.skipped == 1
    run.step(1.0)
    assert not torch.equal(run.model.weight, weight)


def test_any_other_optimizer_gets_a_gradient_of_zeros() -> None:
    run = Training(lambda p: torch.optim.RMSprop(p, lr=0.1))
    run.step(1.0)
    weight = run.model.weight.detach().clone()
    run.step(float("nan"))
    assert torch.equal(run.model.weight, weight)
    run.step(1.0)
    assert not torch.equal(run.model.weight, weight)
    assert bool(run.model.weight.isfinite().all())


def test_three_such_steps_in_a_row_stop_a_run() -> None:
    nan = float("nan")
    run = Training(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True))
    for gradient, loss in ((nan, 1.0), (1.0, nan), (1.0, 1.0), (1.0, float("inf")), (nan, nan)):
        run.step(gradient, loss)
    assert not run.stopping.stopped
    assert run.stopping.last_not_finite == 2
    assert not run.control.should_training_stop
    run.step(float("inf"))
    assert run.stopping.stopped
    assert run.control.should_training_stop
    assert run.control.should_save
    assert run.told == [
        "step 1: the gradient is NaN or infinite, its update was not applied; rows row 1",
        "step 2: the loss is NaN or infinite; rows row 2",
        "step 4: the loss is NaN or infinite; rows row 4",
        "step 5: the loss is NaN or infinite, its update was not applied; rows row 5",
        "step 6: the gradient is NaN or infinite, its update was not applied; rows row 6",
    ]
    with pytest.raises(FinetuneError) as stop:
        run.stopping.explain(step=6, goes_on="again")
    assert str(stop.value) == (
        "the loss or its gradient was NaN or infinite in 3 steps in a row (4 to 6): the run stopped and no adapter was "
        "written. No such gradient was applied: checkpoint-6 holds the last finite weights\n"
        "  where: the batches of these steps: rows row 4, row 5, row 6\n"
        "  fix: look at these rows and at training.learning_rate, and start again; or skip these rows, then: again"
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = Training(lambda p: torch.optim.SGD(p, lr=3e38, fused=True))
    for _ in range(4):  # to weights of 7e38 in float32
        run.step(1.0)
    assert not bool(run.model.weight.isfinite().all())
    for _ in range(3):
        run.step(1.0, float("nan"))
    assert run.control.should_training_stop
    assert not run.control.should_save
    with pytest.raises(FinetuneError, match=r"the weights were not finite before them\n(.|\n)*fix: lower training"):
        run.stopping.explain(step=7, goes_on="again")
    trainer: Any = SimpleNamespace(state=run.state)
    with pytest.raises(FinetuneError) as refusal:
        MoeTrainer.save_tuned(trainer, tmp_path, {"lora_A": torch.ones(2), "lora_B": torch.tensor([1.0, float("nan")])})
    assert str(refusal.value).startswith(
        "1 of 2 trained tensors hold NaN or infinity after step 7: nothing is written\n  where: lora_B\n"
    )
    assert not list(tmp_path.iterdir())


def test_rows_of_a_batch() -> None:
    padded = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert rows_of(padded) == [[1, 2, 3], [4, 5]]
    behind = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert rows_of(behind) == [[1, 2, 3], [4, 5]]


def test_a_run_with_nan_losses_stops_and_names_the_rows(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such step is passed over, three end the run; accumulated, where one of two micro-batches is at fault. Two at
    the end of a run are told there."""
    compute, batches = SFTTrainer.compute_loss, dict[int, list[str]]()
    broken_steps = {2, 4, 5, 6}

    def broken(self: MoeTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        if step in broken_steps and step not in batches:  # the first of its two micro-batches
            batches[step] = self.processing_class.batch_decode(inputs["input_ids"])
            return loss * float("nan")
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", broken)
    recipe = write_recipe(training={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2})
    ran = run_finetune("train", recipe)
    assert ran.status == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    run = tmp_path / "run"
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()
    saved = load_file(run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name), "steps 1 and 3 were applied"
    # Row n of the file asks what comes after n.
    lines = {
        step: {int(re.search(r"after (\d+)", text)[1]) + 1 for text in texts}  # type: ignore[index]
        for step, texts in batches.items()
    }
    for step, numbers in lines.items():
        said = re.search(rf"step {step}: the loss is NaN or infinite, its update was not applied; (.*)", ran.stderr)
        assert said is not None
        assert {int(number) for number in re.findall(r"rows.jsonl line (\d+)", said[1])} == numbers
    assert "NaN or infinite in 3 steps in a row (4 to 6)" in ran.stderr
    where = ran.stderr[ran.stderr.index("  where: the batches") :].splitlines()[0]
    assert {int(number) for number in re.findall(r"line (\d+)", where)} == lines[4] | lines[5] | lines[6]
    # Once the cause is gone, the command that was printed goes on. Here two more such steps are the last ones.
    broken_steps = {7, 8}
    (command,) = re.findall(r"finetune train .*--resume", ran.stderr)
    resumed = run_finetune(*shlex.split(command)[1:])
    assert resumed.status == 0, resumed.stderr
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]
    done = resumed.stdout[resumed.stdout.index("Done") :]
    assert re.search(r"steps skipped \(NaN or infinite\) *│ *2 ", done)
    assert "warning: the loss or gradient of the last 2 steps was NaN or infinite" in done
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["steps_skipped"], summary["last_steps_not_finite"]) == (8, 2, 2)
    kept = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items()), "the last finite weights"


# ---- signals ----------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_the_step_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.goes_on = "again"
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert (stop.value.number, stop.value.goes_on) == (signal.SIGTERM, "again")
    with Signals() as signals, signals.steps():
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_launcher_passes_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Signals() as signals, signals.steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGINT
        now += 60
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_goes_on_by_the_command_that_it_prints_and_an_ended_one_stays(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MoeTrainer.training_step

    def stopped(self: MoeTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    training = {"max_steps": 6, "save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 2}
    recipe, run = write_recipe(training=training), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(MoeTrainer, "training_step", stopped)
        ran = run_finetune("train", recipe)
    assert ran.status == 143
    command = f"finetune train {recipe} --resume"
    assert ran.stderr.endswith(f"stopped by SIGTERM after step 4: checkpoint-4 is saved; to go on:\n  {command}\n")
    assert "Traceback" not in ran.stderr
    assert steps(run) == [1, 2, 3, 4]
    assert [path.name for path in run.glob("checkpoints/*-*")] == ["checkpoint-4"]
    assert not (run / "adapter").exists()
    resumed = run_finetune(*shlex.split(command)[1:], "--json")
    assert resumed.status == 0, resumed.stderr
    assert resumed.document["steps"] == 6
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    # The mean of all six, also of those before the resume.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean = sum(line["loss"] for line in lines if "loss" in line) / 6
    assert resumed.document["train_loss"] == pytest.approx(mean, rel=1e-6)

    # An end within an epoch: nothing is left to do.
    before = contents(run)
    again = run_finetune("train", recipe, "--resume")
    assert again.status == 0, again.stderr
    assert f"{run} ended after 6 steps and everything is saved: nothing to do\n" in again.stdout
    assert contents(run) == before

    # As if it had been killed in its last save.
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    saved = run_finetune("train", recipe, "--resume", "--json")
    assert saved.status == 0, saved.stderr
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert saved.document["steps"] == 6
    assert saved.document["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_signal_cuts_off_an_evaluation(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, seen = MoeTrainer.prediction_step, []

    def stopped(self: MoeTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.state.global_step)
        signal.raise_signal(signal.SIGTERM)
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(MoeTrainer, "prediction_step", stopped)
    training = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    ran = run_finetune("train", write_recipe(training=training))
    assert ran.status == 143
    assert "stopped by SIGTERM after step 1: checkpoint-1 is saved; to go on:\n" in ran.stderr
    assert seen == [1], "one of its eight batches"
    assert [path.name for path in (tmp_path / "run").glob("checkpoints/*-*")] == ["checkpoint-1"]


def test_a_run_that_is_stopped_before_it_has_begun_offers_nothing_to_go_on_with(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    monkeypatch.setattr("finetune.train.run.load_base", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    ran = run_finetune("train", recipe)
    assert ran.status == 130
    assert ran.stderr.endswith("interrupted\n")
    assert "--resume" not in ran.stderr
    assert not (tmp_path / "run").exists()


FAULTS = {
    "a signal": """
        def at_fault(self, *args, **kwargs):
            if self.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return compute(self, *args, **kwargs)
    """,
    "NaN": """
        def at_fault(self, *args, **kwargs):
            return compute(self, *args, **kwargs) * (float("nan") if self.state.global_step > 0 else 1.0)
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_two_processes_stop_at_the_same_step(write_recipe: Write, tmp_path: Path, fault: str) -> None:
    """Only the second one is at fault; what the launcher passes on to both afterwards changes nothing."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys\n"
        "from finetune.cli import main\n"
        "from trl import SFTTrainer\n"
        "compute = SFTTrainer.compute_loss\n"
        + textwrap.dedent(FAULTS[fault])
        + 'if "--resume" not in sys.argv and os.environ["RANK"] == "1":\n'
        "    SFTTrainer.compute_loss = at_fault\n"
        'sys.argv.insert(1, "train")\n'
        "main()\n"
    )
    recipe = write_recipe(training={"per_device_train_batch_size": 2, "max_steps": 6})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command = [*launch, "--main_process_port", "0", str(script), str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    run = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": False, "env": environment}
    stopped = subprocess.run(command, **run)  # type: ignore[call-overload]
    assert stopped.returncode != 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    said = "stopped by SIGTERM after step 4: checkpoint-4 is saved; to go on:\n"
    if fault == "NaN":
        said = "error: the loss or its gradient was NaN or infinite in 3 steps in a row (2 to 4)"
        assert len(re.findall(r"warn   step 2: .* line \d+, .* line \d+\n", stopped.stderr)) == 1, "of one process"
    assert stopped.stderr.count(said) == 1, stopped.stderr
    (printed,) = re.findall(r"(?:then:|^) *(\S*python.* --resume)$", stopped.stderr, re.MULTILINE)
    resumed = subprocess.run(shlex.split(printed), **run)  # type: ignore[call-overload]
    assert resumed.returncode == 0, resumed.stderr
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
