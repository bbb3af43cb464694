"""Questions to the engine, one or several at once, and their answers as they come.

The engine reports each token on its own thread. Here the tokens of all answers go into one queue, which the terminal
reads for one model and the page for two. To cancel, the engine is asked to stop; it ends the answer with a last event,
so no token gets lost on the way. An engine that fails ends each answer the same way, with its error.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from finetune.chat.conversation import Messages
from finetune.errors import DataError, FinetuneError
from finetune.infer import Event, FinishedEvent, Request, Sampling

if TYPE_CHECKING:
    from finetune.infer import Engine, RequestHandle


class Answering:
    """Several requests that are answered at the same time.

    Iterating yields the number of a request and its next event, until all have ended. Leaving the iteration early
    cancels what still runs.

    Raises:
        FinetuneError: the engine refuses one of the requests, or has failed for good; none runs then.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        self._open = len(requests)
        self._handles: list[RequestHandle] = []
        try:
            for number, request in enumerate(requests):
                self._handles.append(engine.submit(request, partial(self._take, number)))
        except FinetuneError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stops every answer where it is. May be called from any thread, and more than once."""
        for handle in self._handles:
            handle.cancel()

    def __iter__(self) -> Generator[tuple[int, Event], None, None]:
        try:
            while self._open:
                number, event = self._events.get()
                self._open -= isinstance(event, FinishedEvent)
                yield number, event
        finally:
            if self._open:
                self.cancel()

    def _take(self, number: int, event: Event) -> None:
        self._events.put((number, event))


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


def is_full(engine: Engine, end: FinishedEvent) -> bool:
    """Whether an answer ended because it reached the model's maximum length."""
    return end.reason == "length" and end.prompt_tokens + end.completion_tokens >= engine.max_length
