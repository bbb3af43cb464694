"""The clock of the bench: a window over the trainer's steps, and the same batches stepped bare.

The device is synchronized only at the ends of a window. The trainer's window runs from the beginning of one step to the
beginning of a later one, so everything between steps is inside: data, callbacks, logging. What the trainer gave to its
model is recorded by hooks, without a copy and without synchronizing; the bare step repeats it: forward, backward, clip,
optimizer, and nothing else. After training the scheduler has ended, so the bare step's learning rate may be zero, which
costs the same.

Leaves out: several processes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.bench.workload import WARM_UP
from finetune.train import MoeTrainer


@dataclass(frozen=True)
class Speed:
    """Steps that were measured."""

    seconds: float
    tokens: int
    losses: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Peak:
    """Device memory in bytes: what tensors held at most, and what the allocator had reserved for them."""

    allocated: int
    reserved: int


def now(device: torch.device) -> float:
    """Seconds from any origin, after the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: torch.device) -> Peak | None:
    if device.type != "cuda":
        return None
    return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


class Window(TrainerCallback):
    """Seconds from the beginning of step `first` to the beginning of step `last`, counted from 0."""

    def __init__(self, first: int, last: int, device: torch.device):
        self.first, self.last, self.device = first, last, device
        self._times: dict[int, float] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in (self.first, self.last):
            self._times[state.global_step] = now(self.device)

    @property
    def seconds(self) -> float:
        return self._times[self.last] - self._times[self.first]


@dataclass
class Recorder:
    """What a model was called with while it trained, and the losses it returned; all still on the device."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def attach(self, model: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert not args, "trainers call models by keyword"
            self.calls.append(dict(kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.losses.append(output.loss.detach())

        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def real_tokens(call: dict[str, Any]) -> int:
    """Tokens of one call without padding; without a mask all of them are real."""
    mask = call.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(call["input_ids"].numel())


class BareStep:
    """One training step of a trainer's model and optimizer over a recorded call."""

    def __init__(self, trainer: MoeTrainer, calls: list[dict[str, Any]]):
        self.trainer, self.calls = trainer, calls
        self.device = trainer.accelerator.device
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.model.train()

    def __call__(self, index: int) -> Tensor:
        accelerator, optimizer = self.trainer.accelerator, self.trainer.optimizer
        assert optimizer is not None, "the trainer has trained"
        loss = self.trainer.model(**self.calls[index % len(self.calls)]).loss
        accelerator.backward(loss)
        if self.trainer.args.max_grad_norm:
            accelerator.clip_grad_norm_(self.parameters, self.trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def measure(self, steps: int) -> Speed:
        for index in range(WARM_UP):
            self(index)
        begun = now(self.device)
        losses = [self(index) for index in range(WARM_UP, WARM_UP + steps)]
        seconds = now(self.device) - begun
        tokens = sum(real_tokens(self.calls[index % len(self.calls)]) for index in range(WARM_UP, WARM_UP + steps))
        return Speed(seconds, tokens, [float(loss) for loss in losses])
