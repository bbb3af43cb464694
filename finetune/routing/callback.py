"""Adds router health to what a transformers (or TRL) trainer logs.

Why: callbacks that write metrics (JSON lines, wandb, the progress line) all receive the same `logs` dict, so a callback
that runs before them can put more numbers into it, and no writer needs to know about routers.

How: the capture is attached while training runs. Each training log gets the sums since the previous one, each
evaluation log those of its evaluation, under the same names with the evaluation's prefix: `router/max_vio_worst` and
`eval_router/max_vio_worst`. `logs` receives scalars only; the load vectors, which scalar loggers cannot take, are what
`loads` returns for the duration of that log. Every process must run this callback: reading the sums is a collective.

Leaves out: drawing (plots.py), alarms.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.routing.capture import Mode, RouterCapture
from finetune.routing.metrics import RouterSums, layer_loads, layer_metrics, layer_scalars, summary


class RouterCallback(TrainerCallback):
    """Logs router health per layer and summarized.

    It must come before every callback that writes `logs`. A trainer puts the callbacks of `report_to` before the ones
    it is given, so pass `report_to="none"` and hand over e.g. `WandbCallback()` yourself, after this one.

    Attributes:
        totals: sums per mode over all logs of this process's training, for the table and the heat map at the end.
    """

    def __init__(self, capture: RouterCapture):
        self.capture = capture
        self.totals: dict[Mode, RouterSums] = {}
        self._loads: dict[str, list[float]] = {}
        self._attached_here = False

    def loads(self) -> dict[str, list[float]]:
        """Load vectors that belong to the log being written, by name; empty when it has no router metrics."""
        return self._loads

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attached_here = not self.capture.attached
        self.capture.attach()
        self.capture.reset("train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        self._loads = {}
        if not self.capture.attached:
            return
        prefix = _evaluation_prefix(logs)
        mode: Mode = "train" if prefix == "" else "eval"
        sums = self.capture.snapshot(mode)
        self.capture.reset(mode)
        if sums.tokens == 0:
            return
        self.totals[mode] = self.totals[mode] + sums if mode in self.totals else sums
        layers = layer_metrics(sums)
        logs.update({prefix + name: value for name, value in summary(layers, tokens=sums.tokens).items()})
        logs.update({prefix + name: value for name, value in layer_scalars(layers).items()})
        self._loads = {prefix + name: load for name, load in layer_loads(layers).items()}

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        # A prediction loop logs nothing; its tokens must not leak into the next evaluation.
        self.capture.reset("eval")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attached_here:
            self.capture.detach()


def _evaluation_prefix(logs: dict[str, Any]) -> str:
    """`eval_` (or `eval_<dataset>_`) for the log of an evaluation, nothing for a training log.

    Trainer.evaluate always logs `<prefix>_runtime`; so does the end of training, as `train_runtime`.
    """
    for name in logs:
        if name.endswith("_runtime") and name != "train_runtime":
            return name.removesuffix("runtime")
    return ""
