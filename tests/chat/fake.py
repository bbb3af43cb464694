"""An engine without a model, so that a test decides when a token comes: it says the last question's words again.

A model `NAME` answers `NAME: word word ...`, one token a word, and ends when the question does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.errors import DataError, EngineError
from finetune.infer.request import Event, FinishedEvent, FinishReason, Request, TokenEvent


@dataclass
class FakeHandle:
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeEngine:
    """Words are tokens; `delay` seconds pass before each."""

    names: tuple[str, ...] = ("tuned", "base")
    max_length: int = 64
    delay: float = 0.0
    refuses_system: bool = False
    silent: bool = False
    model_path: str = "some/model"
    failure: EngineError | None = None
    requests: list[Request] = field(default_factory=list)
    handles: list[FakeHandle] = field(default_factory=list)
    _words: list[str] = field(default_factory=list)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], model: str | None = None) -> tuple[int, ...]:
        if self.refuses_system and messages[0]["role"] == "system":
            raise DataError("the chat template refuses a conversation: no system message here")
        words = [word for message in messages for word in (f"<{message['role']}>", *message["content"].split())]
        start = len(self._words)
        self._words += words
        return tuple(range(start, len(self._words)))

    def submit(self, request: Request, listen: Callable[[Event], None]) -> FakeHandle:
        said = [self._words[token] for token in request.ids]
        question = said[len(said) - said[::-1].index("<user>") :]
        if self.failure is not None:
            raise self.failure
        handle = FakeHandle()
        self.requests.append(request)
        self.handles.append(handle)
        words = [f" {request.model}:", *(f" {word}" for word in question)]
        words = [] if self.silent else words
        threading.Thread(target=self._answer, args=(request, words, listen, handle), daemon=True).start()
        return handle

    def _answer(self, request: Request, words: list[str], listen: Callable[[Event], None], handle: FakeHandle) -> None:
        room = min(request.sampling.max_new_tokens, self.max_length - len(request.ids))
        made = 0
        reason: FinishReason = "stop"
        for word in words:
            if made == room:
                reason = "length"
                break
            if handle.cancelled.wait(self.delay):
                reason = "cancelled"
                break
            if self.failure is not None:
                reason = "error"
                break
            made += 1
            listen(TokenEvent(made, word))
        listen(FinishedEvent(reason, len(request.ids), made, error=self.failure))
