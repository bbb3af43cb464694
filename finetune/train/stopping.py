"""What ends a run before its last step: a signal, or steps without a finite loss and gradient.

Why: one NaN in a gradient makes every weight NaN in that step, and nothing after it can be saved. So an update whose
gradient is not finite is not applied. It is told, with the rows of its batch; where `PATIENCE` follow each other the
data or the learning rate is at fault, and the run stops with a checkpoint of the last finite weights.

How: nothing waits for the device. The norm that clipping computes anyway says on the device whether the update is
applied: torch's fused optimizers skip a step by `found_inf`, which is how mixed precision skips one; other optimizers
get a gradient of zeros, so that momentum and weight decay go on. What a step has to say (gradient, loss, signal) is a
vector of three numbers, whose largest over all processes is copied to the host and read a step later, when it has long
been there: every process reads the same and stops at the same step. On a CPU it is read at once.

An evaluation, which waits for every batch, is cut off by a signal; the checkpoint is that of the step before it.

With fp16, whose loss scale is found by gradients that overflow, the scaler skips steps, and only the loss is judged.

Leaves out: the router's alarms (router/), saving (the trainer's).
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import FinetuneError
from finetune.signals import Interrupted, Signals, is_main

# Consecutive steps without a finite loss and gradient after which a run stops.
PATIENCE = 3
_NAMED = 8  # rows that a message names
_FUSED = (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


@dataclass
class _Step:
    """One optimizer step: what it was computed from, and what it has to say."""

    batches: Sequence[Mapping[str, Tensor]]
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None
    number: int = 0
    words: Tensor | None = None  # on the host: gradient not finite, loss not finite, number of a signal
    ready: torch.cuda.Event | None = None


class EvaluationCut(Interrupted):
    """A signal during an evaluation, in all processes at the same batch."""


class Stopping(TrainerCallback):
    """Watches every step of a trainer that hands over its batches, losses and gradient norms; it comes last.

    Args:
        signals: what the process was told.
        tell: shows one line to the user.
        rows: names rows of the training set by their tokens.

    Attributes:
        skipped: updates that were not applied.
        faulty: the steps that stopped the run, with their rows.
        signal: the number of the signal that stopped the run; 0 for none.
    """

    def __init__(
        self, signals: Signals, *, tell: Callable[[str], None], rows: Callable[[Sequence[Sequence[int]]], list[str]]
    ):
        self.signals, self.tell, self.rows = signals, tell, rows
        self.skipped, self.signal = 0, 0
        self.faulty: list[tuple[int, list[str]]] = []
        self.finite_weights = True
        self._streak: list[tuple[int, list[str]]] = []
        self._step = _Step(())
        self._pending: deque[_Step] = deque()
        self._told_optimizer: Any = None

    @property
    def last_not_finite(self) -> int:
        """How many of the last steps, in a row, had a loss or gradient that is not finite."""
        return len(self._streak)

    @property
    def stopped(self) -> bool:
        return bool(self.faulty) or self.signal != 0

    # ---- from the trainer ---------------------------------------------------------------------------------

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Before a step, with its micro-batches."""
        kept = ("input_ids", "attention_mask", "position_ids")
        self._step = _Step([{name: batch[name] for name in kept if name in batch} for batch in batches])

    def loss(self, loss: Tensor) -> None:
        """Of a micro-batch."""
        self._step.losses.append(loss.detach())

    def gradient(self, norm: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Before the optimizer's step, whose update is not applied where the norm is not finite."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._step.norm = norm.detach()
        if isinstance(optimizer, _FUSED) and optimizer.defaults["fused"]:
            told: Any = optimizer
            told.found_inf, self._told_optimizer = (~norm.isfinite()).float(), told
            return
        for parameter in parameters:
            if parameter.grad is not None:
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                grad.copy_(torch.where(norm.isfinite(), grad, 0.0))

    # ---- events -------------------------------------------------------------------------------------------

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._told_optimizer is not None:
            del self._told_optimizer.found_inf
            self._told_optimizer = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step = self._step
        step.number = state.global_step
        assert step.losses, "the trainer hands over its losses"
        device = step.losses[0].device
        gradient = torch.zeros((), device=device) if step.norm is None else (~step.norm.isfinite()).float()
        losses = (~torch.stack(step.losses).isfinite().all()).float()
        words = torch.stack([gradient, losses, torch.full_like(losses, self.signals.received or 0)])
        if _several():
            dist.all_reduce(words, op=dist.ReduceOp.MAX)
        else:
            self.signal = self.signals.received or 0
        if device.type == "cuda":
            step.words = torch.empty(3, pin_memory=True)
            step.words.copy_(words, non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        else:
            step.words = words
        self._pending.append(step)
        # A log and a save wait for the device anyway.
        now = control.should_log or control.should_save or state.global_step >= state.max_steps
        self._read(waiting=1 if device.type == "cuda" and not now else 0)
        if self.stopped:
            self.finite_weights = _all_finite(p for p in model.parameters() if p.requires_grad)
            control.should_training_stop = True
            control.should_evaluate, control.should_save = False, self.finite_weights

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        received = self.signals.received or 0
        if _several():
            word = torch.tensor(received, device=args.device)
            dist.all_reduce(word, op=dist.ReduceOp.MAX)
            received = int(word)
        if received:
            self.signal = received
            raise EvaluationCut(received, goes_on=self.signals.goes_on)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:  # within an epoch, and saved already
            control.should_log = control.should_evaluate = control.should_save = False

    # ---- what was found -----------------------------------------------------------------------------------

    def explain(self, *, step: int, goes_on: str | None) -> None:
        """Says why the run stopped before its last step, if it did.

        Args:
            step: the last one.
            goes_on: the command that goes on from the checkpoint.

        Raises:
            Interrupted: a signal.
            FinetuneError: steps without a finite loss and gradient; in the main process.
        """
        saved = f"checkpoint-{step}" if self.finite_weights else None
        if self.faulty and is_main():  # one message; the others end as they are
            numbers = [number for number, _ in self.faulty]
            rows = list(dict.fromkeys(name for _, names in self.faulty for name in names))
            then = f", then: {goes_on}" if goes_on and saved else ""
            raise FinetuneError(
                f"the loss or its gradient was NaN or infinite in {len(numbers)} steps in a row ({numbers[0]} to "
                f"{numbers[-1]}): the run stopped and no adapter was written. No such gradient was applied: "
                + (f"{saved} holds the last finite weights" if saved else "the weights were not finite before them"),
                where=f"the batches of these steps: {_listed(rows)}",
                fix=f"look at these rows and at training.learning_rate, and start again; or skip these rows{then}"
                if saved
                else "lower training.learning_rate and start again",
            )
        if self.signal:
            name = signal.Signals(self.signal).name
            said = f"stopped by {name} after step {step}: " + (f"{saved} is saved" if saved else "nothing was saved")
            raise Interrupted(self.signal, what=said, goes_on=goes_on)

    def _read(self, *, waiting: int) -> None:
        """What all steps but the last few had to say. All processes read the same ones."""
        while len(self._pending) > waiting and not self.faulty:
            step = self._pending.popleft()
            assert step.words is not None
            if step.ready is not None:
                step.ready.synchronize()
            gradient, loss, received = step.words.tolist()
            self.signal = self.signal or int(received)
            if not (gradient or loss):
                self._streak = []
                continue
            self.skipped += bool(gradient)
            names = self._names(step, by_loss=bool(loss))
            self._streak.append((step.number, names))
            self.tell(
                f"step {step.number}: the {'loss' if loss else 'gradient'} is NaN or infinite"
                f"{', its update was not applied' if gradient else ''}; {_listed(names)}"
            )
            if len(self._streak) >= PATIENCE:
                self.faulty = self._streak

    def _names(self, step: _Step, *, by_loss: bool) -> list[str]:
        """The rows of the micro-batches at fault, over all processes; those with such a loss where there are any."""
        suspects = [
            batch
            for batch, loss in zip(step.batches, step.losses, strict=True)
            if not (by_loss and bool(loss.isfinite()))
        ]
        names = self.rows([row for batch in suspects for row in rows_of(batch)])
        if _several():
            everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, names)
            names = [name for of_process in everywhere for name in of_process]
        return names


def rows_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """The tokens of each row of a micro-batch, whether its rows are padded or lie one behind the other."""
    ids = batch["input_ids"].cpu()
    mask = batch["attention_mask"].bool().cpu() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    if "position_ids" not in batch:
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    ids, begins = ids[mask], (batch["position_ids"].cpu()[mask] == 0).nonzero().flatten().tolist()
    return [ids[begin:end].tolist() for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True)]


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "rows that could not be found in the files"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"rows {', '.join(names[:_NAMED])}{more}"


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Over all processes, which may hold shards."""
    parts = [(p.to_local() if isinstance(p, DTensor) else p).detach().isfinite().all() for p in parameters]
    finite = torch.stack(parts).all().float()
    if _several():
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)
