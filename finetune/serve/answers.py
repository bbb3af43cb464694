"""From the engine's thread to the event loop: the answers of one HTTP request.

The engine reports every token on its own thread and must not wait; and while the loop handles a token it holds the
interpreter's lock, which the engine needs too. So a token costs the engine one append, and the loop handles what has
arrived meanwhile together: the tokens of one step of the whole batch, or of several steps shorter than `TURN_SECONDS`.
An answer that is not streamed keeps its tokens until its end.

The engine ends every answer with a FinishedEvent, even if it is cancelled or the engine dies; readers rely on it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

from finetune.infer import Event, FinishedEvent, TokenEvent

if TYPE_CHECKING:
    from finetune.infer import RequestHandle


# Telling one client takes about 45 microseconds, mostly the system call, so 16 clients take at most 4% of the time.
# Nobody notices that text arrives 50 times a second.
TURN_SECONDS = 0.020


class Bridge:
    """Hands events to a running event loop, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._turn = loop.time()
        self._next_turn: asyncio.TimerHandle | None = None
        self._events: deque[tuple[Answer, Event]] = deque()
        self._woken = False
        self._closed = False
        self._lock = Lock()

    def put(self, answer: Answer, event: Event) -> None:
        """Adds an event, from any thread; after `close` it is dropped."""
        self._events.append((answer, event))
        # The loop clears the flag before it empties the queue, so an event behind a set flag is still taken along.
        ends = isinstance(event, FinishedEvent)
        if self._woken and not ends:
            return
        self._woken = True
        with self._lock:
            if not self._closed:
                # A client may have its next request ready, so an end is delivered at once.
                self._loop.call_soon_threadsafe(self._deliver if ends else self._wake)

    def close(self) -> None:
        """Call before the loop is closed; later events are dropped."""
        with self._lock:
            self._closed = True

    def _wake(self) -> None:
        wait = self._turn + TURN_SECONDS - self._loop.time()
        if wait <= 0:
            self._deliver()
        elif self._next_turn is None:
            self._next_turn = self._loop.call_later(wait, self._deliver)

    def _deliver(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        self._turn = self._loop.time()
        self._woken = False
        while self._events:
            answer, event = self._events.popleft()
            answer.take(event)


class Answer:
    """One sequence of tokens that the engine generates.

    Attributes:
        number: its index among the answers of the request.
        first, last: monotonic time of its first and latest token, seconds; `first` is None before any.
        tokens: how many have arrived.
    """

    def __init__(self, number: int, answers: Answers, bridge: Bridge):
        self.number = number
        self.handle: RequestHandle | None = None
        self.first: float | None = None
        self.last = 0.0
        self.tokens = 0
        self.finished: FinishedEvent | None = None
        self._answers = answers
        self._bridge = bridge
        self._kept: list[TokenEvent] = []

    def listen(self, event: Event) -> None:
        """Receives an event on the engine's thread."""
        if isinstance(event, TokenEvent):
            self.last = monotonic()
            self.tokens += 1
            if self.first is None:
                self.first = self.last
            if not self._answers.live:
                self._kept.append(event)
                return
        self._bridge.put(self, event)

    def take(self, event: Event) -> None:
        """Receives an event on the loop."""
        if isinstance(event, FinishedEvent):
            self.finished = event
            events: list[Event] = [*self._kept, event]
            self._kept = []
        else:
            events = [event]
        self._answers.take(self, events)


class Answers:
    """The answers of one HTTP request, on the loop's side.

    Args:
        count: how many there will be.
        live: whether tokens are read as they arrive, or each answer as a whole at its end.
        done: called on the loop for each answer that ended.
    """

    def __init__(self, bridge: Bridge, count: int, *, live: bool, done: Callable[[Answer], None]):
        self.live = live
        self.all = [Answer(number, self, bridge) for number in range(count)]
        self.open = count
        self._done = done
        self._batch: list[tuple[int, Event]] = []
        self._waiting: asyncio.Future[None] | None = None

    def take(self, answer: Answer, events: list[Event]) -> None:
        self._batch.extend((answer.number, event) for event in events)
        if answer.finished is not None:
            self.open -= 1
            self._done(answer)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def batch(self) -> list[tuple[int, Event]]:
        """Waits for events and returns all since the last call; an empty list once all answers have ended."""
        if not self._batch and self.open:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        batch, self._batch = self._batch, []
        return batch

    def cancel(self) -> None:
        """Cancels the answers that still run; may be called more than once."""
        if self.open:
            for answer in self.all:
                if answer.handle is not None and answer.finished is None:
                    answer.handle.cancel()
