"""SIGTERM and SIGINT (Ctrl+C) while a run trains: the step ends, a checkpoint is saved, and only then the process.

Why: a preempted machine, a scheduler's time limit and Ctrl+C cost at most a step, not everything since the last save.

How: within `steps()` the first signal is only noted, and whoever trains looks at `received` after each step. Before and
after it raises `Interrupted` where the process is, as Ctrl+C always does, so that what was claimed is given back. A
second signal raises wherever the process is, a third one ends it. A launcher passes on the signal that its workers may
have had already, so there one more of the kind shortly after counts as the same.

Leaves out: agreeing among processes, and saving (stopping.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a launcher passes a signal on.
_RELAYED = 5.0


class Interrupted(KeyboardInterrupt):
    """The process was told to end.

    Args:
        number: of the signal; the exit status is 128 more.
        what: what is said.
        goes_on: the command that goes on; None where there is nothing to go on with.
    """

    def __init__(self, number: int, *, what: str = "interrupted", goes_on: str | None = None):
        self.number, self.what, self.goes_on = number, what, goes_on
        super().__init__(what)


class Signals:
    """Takes the two signals while it is entered; in a thread other than the main one it leaves them as they are.

    Attributes:
        received: the number of the first signal that came within `steps()`.
        goes_on: the command that goes on with what was begun, once there is something.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.goes_on: str | None = None
        self._stepping = False
        self._count, self._at = 0, 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Whoever ignores a signal (nohup, a background job) goes on ignoring it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Within it the first signal waits for the step to end."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker: the signal does what it does without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._count and "TORCHELASTIC_RUN_ID" in os.environ and now - self._at < _RELAYED:
            return
        self._count, self._at = self._count + 1, now
        if self._count > 2:
            os._exit(128 + number)
        if self._count == 1 and self._stepping:
            self.received = number
            if is_main():
                said = f"{signal.Signals(number).name}: stopping after this step; once more stops at once\n"
                os.write(2, said.encode())
            return
        raise Interrupted(number, goes_on=self.goes_on)


def is_main() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
