"""Adds router health to what a transformers (or TRL) trainer logs.

Why: callbacks that write metrics (JSON lines, wandb, the progress line) all receive the same `logs` dict, so a callback
that runs before them can put more numbers into it, and no writer needs to know about routers.

How: the capture is attached while training runs. Each training log gets the sums since the previous one, each
evaluation log those of its evaluation, under the same names with the evaluation's prefix: `router/max_vio_worst` and
`eval_router/max_vio_worst`. `logs` receives scalars only; what scalar loggers cannot take is what `vectors` returns for
the duration of that log. With a `RouterWatch` the probe is read at the first evaluation log of a step, or every so many
steps, and `router/drift/...` joins that log; what was logged is judged, and an alarm that stops the run saves first.
Every process must run this callback: reading the sums is a collective.

Leaves out: what the numbers are called (names.py), the comparison with the base (watch.py), drawing (plots.py).
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.router.capture import Mode, RouterCapture
from finetune.router.drift import Drift, drift_scalars, drift_vectors
from finetune.router.metrics import RouterSums, layer_metrics
from finetune.router.names import brief_scalars, layer_scalars, layer_vectors, part_scalars
from finetune.router.watch import RouterWatch

# Without evaluations the probe is read ten times a run, and not more often than every so many steps.
_FEWEST_STEPS = 10


class RouterCallback(TrainerCallback):
    """Logs router health per layer and summarized.

    It must come before every callback that writes `logs`. A trainer puts the callbacks of `report_to` before the ones
    it is given, so pass `report_to="none"` and hand over e.g. `WandbCallback()` yourself, after this one.

    Args:
        capture: of the model that trains.
        detailed: also log every metric of every layer.
        watch: compares the run with its base.

    Attributes:
        totals: sums per mode over all logs of this process's training, for the table and the heat map at the end.
    """

    def __init__(self, capture: RouterCapture, *, detailed: bool = False, watch: RouterWatch | None = None):
        self.capture, self.detailed, self.watch = capture, detailed, watch
        self.totals: dict[Mode, RouterSums] = {}
        self._vectors: dict[str, list[float]] = {}
        self._attached_here = False
        self._drift: Drift | None = None  # waits for the next log
        self._drift_step = -1

    def vectors(self) -> dict[str, list[float]]:
        """Vectors that belong to the log being written, by name; empty when it has no router metrics."""
        return self._vectors

    @property
    def stopped_by(self) -> str | None:
        """The message of the alarm that stopped the run."""
        alarm = None if self.watch is None else self.watch.stopped_by
        return None if alarm is None else alarm.message

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attached_here = not self.capture.attached
        self.capture.attach()
        self.capture.reset("train")
        if self.watch is not None:
            if self.watch.every is None and args.eval_strategy == "no":
                self.watch.every = max(_FEWEST_STEPS, state.max_steps // 10)
            self.watch.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.watch is not None and self.watch.every is not None and state.global_step % self.watch.every == 0:
            self._read_probe(state, control)
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        self._vectors = {}
        if not self.capture.attached:
            return
        prefix = _evaluation_prefix(logs)
        mode: Mode = "train" if prefix == "" else "eval"
        parts = self.capture.snapshot_parts(mode)
        self.capture.reset(mode)
        sums = parts["prompt"] + parts["completion"]
        if sums.tokens > 0:
            self.totals[mode] = self.totals[mode] + sums if mode in self.totals else sums
            layers = layer_metrics(sums)
            scalars = {**brief_scalars(layers, tokens=sums.tokens), **part_scalars(parts)}
            if self.detailed:
                scalars |= layer_scalars(layers)
            logs.update({prefix + name: value for name, value in scalars.items()})
            self._vectors = {prefix + name: values for name, values in layer_vectors(layers).items()}
            if mode == "train" and self.watch is not None and self.watch.judge(state.global_step, window=sums):
                _stop(control)
        by_evaluation = self.watch is not None and self.watch.every is None and mode == "eval"
        if by_evaluation and self._drift_step != state.global_step:
            self._read_probe(state, control)
        if self._drift is not None:
            logs.update(drift_scalars(self._drift))
            self._vectors |= drift_vectors(self._drift)
            self._drift = None

    def _read_probe(self, state: TrainerState, control: TrainerControl) -> None:
        assert self.watch is not None
        self._drift, self._drift_step = self.watch.drift(), state.global_step
        if self._drift is not None and self.watch.judge(state.global_step, drift=self._drift):
            _stop(control)

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


def _stop(control: TrainerControl) -> None:
    control.should_save = control.should_training_stop = True


def _evaluation_prefix(logs: dict[str, Any]) -> str:
    """`eval_` (or `eval_<dataset>_`) for the log of an evaluation, nothing for a training log.

    Trainer.evaluate always logs `<prefix>_runtime`; so does the end of training, as `train_runtime`.
    """
    for name in logs:
        if name.endswith("_runtime") and name != "train_runtime":
            return name.removesuffix("runtime")
    return ""
