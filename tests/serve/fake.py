"""An engine whose tokens come when a test says so, for what a real one does too fast or never: fill up, stall, die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import AutoTokenizer

from finetune.errors import DataError, EngineError
from finetune.infer.request import Event, FinishedEvent, Request, TokenEvent
from finetune.infer.text import PromptEnd, Vocabulary
from tests.conftest import REPOSITORY

MODEL = REPOSITORY / "recipes" / "tiny-mixtral" / "model"


@cache
def bundled_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@dataclass
class FakeHandle:
    engine: FakeEngine
    request: Request
    listen: Callable[[Event], None]
    said: int = 0

    def cancel(self) -> None:
        self.engine.cancel(self)


class FakeEngine:
    """Answers with "0 1 2 ...", one token of each request a step; steps come by themselves unless they are held.

    Duck-typed: what the server touches of an Engine, and no more.
    """

    names = ("fake", "other")
    max_length = 256

    def __init__(self, *, max_batch: int = 4):
        self.tokenizer = bundled_tokenizer()
        self.settings: Any = _Settings(max_batch)
        self.failure: EngineError | None = None
        self.restarts = 0
        self._held = False
        self._closed = False
        self._open: list[FakeHandle] = []
        self._cancelled: list[FakeHandle] = []
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, listen: Callable[[Event], None]) -> FakeHandle:
        if request.model not in self.names:
            raise DataError(f"no model {request.model}")
        handle = FakeHandle(self, request, listen)
        with self._work:
            self._open.append(handle)
            self._work.notify()
        return handle

    def tokenizer_of(self, model: str | None) -> Any:
        return self.tokenizer

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], model: str | None = None, *, continues: bool = False
    ) -> tuple[int, ...]:
        return self.encode_text("".join(message["content"] for message in messages))

    def encode_text(self, text: str, model: str | None = None) -> tuple[int, ...]:
        return (1, *self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_end(self, ids: Sequence[int], model: str | None = None) -> PromptEnd:
        return PromptEnd.of(Vocabulary(self.tokenizer), ids)

    def cancel(self, handle: FakeHandle) -> None:
        with self._work:
            self._cancelled.append(handle)
            self._work.notify()

    def hold(self, held: bool) -> None:
        """Whether the next step waits."""
        with self._work:
            self._held = held
            self._work.notify()

    def fail(self) -> None:
        """Dies as the engine would of an exception on its thread."""
        with self._work:
            self.failure = EngineError("the engine failed while it answered: out of memory")
            self._work.notify()

    def stats(self) -> Any:
        running = min(len(self._open), self.settings.max_batch)
        return _Stats(running, len(self._open) - running)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        while not (self._closed or self.failure):
            with self._work:
                self._work.wait_for(self._has_work)
                cancelled = [handle for handle in self._cancelled if handle in self._open]
                self._cancelled = []
                batch = self._open[: self.settings.max_batch] if not self._held else []
            for handle in cancelled:
                self._finish(handle, "cancelled")
            for handle in batch:
                if handle in self._open:
                    handle.listen(TokenEvent(5, f"{handle.said} "))
                    handle.said += 1
                    if handle.said == min(handle.request.sampling.max_new_tokens, 200):
                        self._finish(handle, "length")
        for handle in list(self._open):
            self._finish(handle, "cancelled")

    def _has_work(self) -> bool:
        return bool(self._closed or self._cancelled or self.failure or (self._open and not self._held))

    def _finish(self, handle: FakeHandle, reason: Any) -> None:
        with self._work:
            self._open.remove(handle)
        handle.listen(FinishedEvent(reason, len(handle.request.ids), handle.said))


@dataclass(frozen=True)
class _Settings:
    max_batch: int


@dataclass(frozen=True)
class _Stats:
    running: int
    waiting: int
    prompt_tokens: int = 7
    completion_tokens: int = 9
    requests: int = 1
    cancelled: int = 0
    failed: int = 0
    preempted: int = 0
    kv_pages_used: int = 3
    kv_pages: int = 10
    kv_page_tokens: int = 16
    expert_hits: int | None = None
    expert_misses: int | None = None
    expert_fetched_bytes: int | None = None
