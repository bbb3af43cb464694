"""Shows how a training run is doing: loss, learning rate, tokens/s, time left, worst router imbalance.

Why: the trainer's own progress callbacks print raw dictionaries, partly on standard output, which belongs to a
command's result.

How: on a terminal a rich progress bar on standard error, redrawn from the training loop and not from a thread;
otherwise one plain line per log. The numbers come from `logs`, whoever put them there. Nothing of the terminal's state
is changed (the cursor stays visible), so a process killed at any moment leaves nothing to mend.

Tokens/s counts the time of training only: evaluating and saving are taken out, and the device's work is in, because a
log waits for it. It is also put into `logs` as `tokens_per_second`, so this callback comes before those that write, and
over the whole run it is the callback's own `tokens_per_second`.

Leaves out: the trainer's own progress callbacks; remove them (`PrinterCallback` and transformers' `ProgressCallback`).
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable, Sized
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Seconds between two redraws of the bar, and between two plain lines of a long evaluation.
_REDRAW, _PLAIN_EVALUATION = 0.1, 30.0


class _StderrConsole(Console):
    """A console on standard error that never hides the cursor: a killed process could not show it again."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Bar(Progress):
    """The bars, and below them one line of numbers, which a narrow terminal shortens instead of the bars."""

    def __init__(self, console: Console):
        self.numbers = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.numbers:
            yield Text(f"      {self.numbers}", no_wrap=True, overflow="ellipsis")


class ProgressCallback(TrainerCallback):
    """Progress on standard error, from the main process only.

    The bar ends with training. When training raises, call `close`, or use the callback as a context manager around it.

    Args:
        console: where to draw; standard error by default.
        clock: seconds from any origin.
    """

    def __init__(self, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console if console is not None else _StderrConsole()
        self.clock = clock
        self._bar: _Bar | None = None
        self._train_task: TaskID | None = None
        self._eval_task: TaskID | None = None
        self._training = False
        self._drawn = -_REDRAW
        # Of this training: start, first step, seconds spent on other things, and the end of the last accounted event.
        self._start, self._first_step, self._other, self._mark = 0.0, 0, 0.0, 0.0
        # TRL's num_tokens counts over the life of its trainer, so these two are never reset.
        self._tokens, self._tokens_at = 0.0, 0.0
        self._warm: tuple[float, float] | None = None  # both, at the end of the first window
        self._eval_start, self._eval_done, self._eval_said = 0.0, 0, 0.0

    # ---- events -----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True
        self._start = self._mark = self.clock()
        self._first_step, self._other, self._tokens_at, self._warm = state.global_step, 0.0, 0.0, None
        if state.is_world_process_zero and self.console.is_interactive:
            self._train_task = self._open().add_task(
                "train", total=state.max_steps, completed=state.global_step, left=""
            )
            self._redraw(at_once=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = self.clock()
        if self._bar is not None and self._train_task is not None:
            self._bar.update(self._train_task, completed=state.global_step, left=self._left(state))
            self._redraw()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        if "loss" not in logs:
            return
        if "num_tokens" in logs:
            busy = self.clock() - self._start - self._other
            if busy > self._tokens_at:
                logs["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / (busy - self._tokens_at)
            self._tokens, self._tokens_at = logs["num_tokens"], busy
            self._warm = self._warm or (self._tokens, self._tokens_at)
        if not state.is_world_process_zero:
            return
        numbers = _numbers(logs)
        if self._bar is not None:
            self._bar.numbers = numbers
            self._redraw(at_once=True)
        else:
            self._say(f"train  {_step(state)}  {numbers}  {self._left(state)}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        now = self.clock()
        total = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else None
        if self._eval_done == 0:
            self._eval_start = self._mark if self._training else now
            self._eval_said = now
        self._eval_done += 1
        if self.console.is_interactive:
            if self._eval_task is None:
                self._eval_task = self._open().add_task("eval", total=total, left="")
            self._open().update(self._eval_task, completed=self._eval_done)
            self._redraw()
        elif now - self._eval_said >= _PLAIN_EVALUATION:
            self._eval_said = now
            self._say(f"eval   batch {self._eval_done}/{'?' if total is None else total}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._end_evaluation(state, metrics if metrics is not None else {})

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._end_evaluation(state, metrics if metrics is not None else {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._not_training()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        self.close()

    @property
    def tokens_per_second(self) -> float | None:
        """Of this training without its first logged window, which is warm-up; None where nothing else was logged."""
        if self._warm is None or self._tokens_at <= self._warm[1]:
            return None
        return (self._tokens - self._warm[0]) / (self._tokens_at - self._warm[1])

    # ---- the bar ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Draws the bar a last time and lets go of the terminal. May be called at any time, more than once."""
        bar, self._bar, self._train_task, self._eval_task = self._bar, None, None, None
        if bar is not None:
            bar.stop()
            atexit.unregister(self.close)

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open(self) -> _Bar:
        if self._bar is None:
            self._bar = _Bar(self.console)
            self._bar.start()
            atexit.register(self.close)
        return self._bar

    def _redraw(self, *, at_once: bool = False) -> None:
        now = self.clock()
        if self._bar is not None and (at_once or now - self._drawn >= _REDRAW):
            self._drawn = now
            self._bar.refresh()

    def warn(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        self._say(f"warn   {line}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    # ---- numbers ----------------------------------------------------------------------------------------

    def _not_training(self) -> None:
        """Takes the time since the last accounted event out of training time."""
        now = self.clock()
        self._other += now - self._mark
        self._mark = now

    def _end_evaluation(self, state: TrainerState, metrics: dict[str, Any]) -> None:
        self._not_training()
        if not state.is_world_process_zero:
            return
        prefix = next((name.removesuffix("loss") for name in metrics if name.endswith("_loss")), "eval_")
        numbers = _numbers({name.removeprefix(prefix): value for name, value in metrics.items()})
        took = _duration(self.clock() - self._eval_start)
        if self._bar is not None and self._eval_task is not None:
            self._bar.remove_task(self._eval_task)
            self._redraw(at_once=True)
        self._eval_task, self._eval_done = None, 0
        self._say(f"{prefix.rstrip('_'):<5}  {_step(state)}  {numbers}  in {took}")
        if not self._training:
            self.close()

    def _left(self, state: TrainerState) -> str:
        """Time left at the pace so far, evaluations included."""
        steps = state.global_step - self._first_step
        if steps <= 0:
            return ""
        return f"{_duration((state.max_steps - state.global_step) * (self.clock() - self._start) / steps)} left"


def _numbers(logs: dict[str, Any]) -> str:
    """What is shown of a log, formatted, in order."""
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "router/max_vio_worst": "MaxVio {:.2f}",
    }
    return "  ".join(text.format(logs[name]) for name, text in formats.items() if name in logs)


def _step(state: TrainerState) -> str:
    """`step 40/300`; an evaluation outside training knows no last step."""
    return f"step {state.global_step}/{state.max_steps}" if state.max_steps else f"step {state.global_step}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
