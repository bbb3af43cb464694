"""Writes every log of a training run as one line of JSON, and reads the file back.

Why: a run must be readable without an account anywhere, while it runs and after it was killed.

How: one line per log with `step`, `epoch`, `seconds` (wall time of training, summed over restarts) and everything in
`logs`. The file is opened for each line, so nothing is lost or left open when the process dies. JSON has no NaN and no
infinity: both become null. When training starts from a checkpoint, lines written after that checkpoint belong to steps
that will be run again, so they are dropped; a half-written last line is dropped too.

Leaves out: rotation, compression.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.console import strict_json
from finetune.disk import write_text
from finetune.errors import OutputError


class JsonlCallback(TrainerCallback):
    """Appends each log to `path` as one JSON object; only the main process writes.

    It comes after the callbacks that add to `logs`.

    Args:
        path: the file; missing folders are made.
        extra: functions called at each log for what belongs on the line but not into `logs`, e.g.
            `RouterCallback.vectors` (vectors, which scalar loggers cannot take).
        clock: seconds from any origin.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        extra: Sequence[Callable[[], Mapping[str, Any]]] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.extra, self.clock = Path(path), tuple(extra), clock
        self._origin: float | None = None  # clock at 0 seconds; None until this process has touched the file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        fresh = state.global_step == 0 and self._origin is None
        kept = [] if fresh else keep_up_to(self.path, state.global_step)
        if fresh:
            replace_lines(self.path, [])
        if self._origin is None:
            self._origin = self.clock() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        if not state.is_world_process_zero:
            return
        if self._origin is None:  # an evaluation before any training
            self._origin = self.clock()
        line: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "seconds": round(self.clock() - self._origin, 3),
            **logs,
        }
        for provider in self.extra:
            line.update(provider())
        append_line(self.path, line)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line; missing folders are made, NaN and infinity become null.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict_json(line), allow_nan=False) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def keep_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps, which a resumed run takes again, and a half-written end; returns what is kept."""
    if not path.exists():
        return []
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_lines(path, kept)
    return kept


def replace_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file whole: a reader or a crash sees the old one or the new one.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise _unwritable(path, error) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a crash is left out.

    Raises:
        OutputError: another line is not a JSON object with a step, so this is not a file of ours.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[dict[str, Any]] = []
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise OutputError(
                "a metrics file holds something else than metrics",
                where=f"{path}, line {number}: {text[:60]!r}",
                allowed='one JSON object with a "step" per line',
                fix="move the file away or choose another output.dir",
            )
    return records


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the metrics file cannot be written: {error.strerror}",
        where=str(path),
        fix="free some space or make the folder writable, or choose another output.dir, then resume",
    )
