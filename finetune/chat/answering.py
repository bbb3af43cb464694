"""Questions to the engine, one or several at once, and their answers as they come.

The engine reports each token on its own thread. Here the tokens of all answers go into one queue, which the terminal
reads for one model and the page for two. To cancel, the engine is asked to stop; it ends the answer with a last event,
so no token gets lost on the way. An engine that fails ends each answer the same way, with its error.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from finetune.chat.conversation import Messages
from finetune.errors import DataError, FinetuneError
from finetune.infer import Event, FinishedEvent, Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from finetune.infer import Engine, RequestHandle


@dataclass
class Answer:
    """What has come of one answer.

    Attributes:
        text: without white space before it.
        tokens: ids.
        times: monotonic seconds of each token.
        end: the last event, once it has come.
    """

    request: Request
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end: FinishedEvent | None = None

    def take(self, event: Event) -> None:
        self.text += event.text if self.text else event.text.lstrip()
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
            self.times.append(time.monotonic())
        else:
            self.end = event

    def course(self, longest: int, *, starts_over: str) -> list[str]:
        """Tokens per second after the first, and why the answer ended if it did not end by itself.

        Args:
            longest: the engine's `max_length`.
            starts_over: what the user can do where that is reached.
        """
        said, end = [], self.end
        if len(self.times) > 1 and self.times[-1] > self.times[0]:
            said.append(f"{(len(self.times) - 1) / (self.times[-1] - self.times[0]):.1f} tokens/s")
        if end is not None and end.error is not None:
            said.append(end.error.what)
        elif end is not None and end.reason == "cancelled":
            said.append("stopped")
        elif end is not None and end.reason == "length":
            if end.prompt_tokens + end.completion_tokens >= longest:
                said.append(f"the model's maximum of {longest:,} tokens is reached: {starts_over} starts over")
            else:
                said.append(f"cut at max_new_tokens={self.request.sampling.max_new_tokens}")
        return said


class Answering:
    """Several requests that are answered at the same time.

    Attributes:
        answers: of each request, as far as `states` has brought them.

    Raises:
        FinetuneError: the engine refuses one of the requests, or has failed for good; none runs then.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self.answers = [Answer(request) for request in requests]
        self._events: SimpleQueue[tuple[Answer, Event]] = SimpleQueue()
        self._handles: list[RequestHandle] = []
        try:
            for answer in self.answers:
                self._handles.append(engine.submit(answer.request, partial(self._hear, answer)))
        except FinetuneError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stops every answer where it is. May be called from any thread, and more than once."""
        for handle in self._handles:
            handle.cancel()

    def states(self, *, apart: float = 0.0) -> Generator[list[Answer], None, None]:
        """Yields the answers as they grow, at most every `apart` seconds; at the last, all have ended.

        Leaving the iteration early cancels what still runs.
        """
        shown, unfinished = 0.0, len(self.answers)
        try:
            while unfinished:
                answer, event = self._events.get()
                answer.take(event)
                unfinished -= answer.end is not None
                now = time.monotonic()
                if now - shown >= apart or not unfinished:
                    yield self.answers
                    shown = now
        finally:
            if unfinished:
                self.cancel()

    def _hear(self, answer: Answer, event: Event) -> None:
        self._events.put((answer, event))


def request_for(engine: Engine, messages: Messages, sampling: Sampling, model: str | None) -> Request:
    """The request for the next answer of a conversation.

    Raises:
        DataError: the chat template refuses the conversation, or it leaves no room for an answer.
    """
    ids = engine.encode_chat(messages, model)
    if len(ids) >= engine.max_length:
        raise DataError(
            f"the conversation no longer fits: with this question it has {len(ids):,} tokens",
            where="the conversation",
            allowed=f"fewer than {engine.max_length:,}, the length of a conversation with its answer",
            fix="start a new conversation (/reset), or ask something shorter",
        )
    return Request(ids, sampling, model)
