"""Where requests are counted, refused and handed to the engine.

A waiting request costs little, but a client would rather hear at once that it is one too many than after its own
timeout. So requests are counted here: those beyond what decodes at once are waiting, whichever of the engine's limits
they wait for. A request counts from the moment its body has arrived, also while it is encoded. A stop waits for every
request that was admitted, also for those whose body is still arriving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune.errors import DataError, EngineError
from finetune.infer import Request
from finetune.serve.answers import Answer, Answers, Bridge
from finetune.serve.api_error import APIError
from finetune.serve.metrics import Metrics

if TYPE_CHECKING:
    from finetune.infer import Engine


class Admission:
    """Counts, admits and refuses requests, and hands them to the engine. Call its methods on the event loop only.

    Args:
        max_waiting: answers that may wait beyond those that decode at once.

    Attributes:
        open: answers that wait or run, and requests that are being encoded.
        entered: requests that were admitted but not yet handed to the engine.
        stopping: whether new requests are refused.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, max_waiting: int):
        self.engine = engine
        self.metrics = metrics
        self.capacity = engine.settings.max_batch + max_waiting
        self.open = self.entered = 0
        self.stopping = False
        self._stopped_at_once = False
        self._bridge: Bridge | None = None
        self._unfinished: set[Answers] = set()

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call before the first request."""
        self._bridge = Bridge(loop)

    def disconnect(self) -> None:
        """Call before the loop is closed."""
        if self._bridge is not None:
            self._bridge.close()

    def require_service(self) -> None:
        """Raises APIError while stopping, and after the engine died."""
        self._require_engine()
        if self.stopping:
            raise APIError(503, "the server is stopping; try another one, or try later", code="stopping")

    def _require_engine(self) -> None:
        if self.engine.failure is not None:
            raise APIError(503, "the engine has failed; the server is about to stop", code="engine_failed")

    def require_model(self, name: str | None) -> str:
        """The name of a model, the first one's for None; raises APIError if there is none of that name."""
        names = self.engine.names
        if name is None:
            return names[0]
        if name not in names:
            message = f"the model {name!r:.200} does not exist; available: {', '.join(names)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return name

    def require_capacity(self, count: int) -> None:
        """Raises APIError if a request asks for more answers than the server can ever hold."""
        if count > self.capacity:
            message = f"n times the number of prompts is {count} answers; allowed: up to {self.capacity}"
            raise APIError(400, message, param="n")

    def require_room(self, count: int = 1) -> None:
        """Raises APIError unless there is room for so many more answers."""
        if self.open + count > self.capacity:
            message = f"{self.open} answers run or wait, of {self.capacity} at most; try again later"
            raise APIError(429, message, code="rate_limit_exceeded")

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Counts a request as entered until it is handed to the engine.

        Raises:
            APIError: the server is stopping, full, or its engine has failed.
        """
        self.require_service()
        self.require_room()
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    @contextmanager
    def holding_a_place(self) -> Iterator[None]:
        """Holds a place while a request is encoded; raises APIError if none is left."""
        self.require_room()
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def submit(self, requests: Sequence[Request], *, live: bool, began: float) -> Answers:
        """Hands requests to the engine. Those that were admitted before a stop are still taken.

        Args:
            live: whether their tokens are read as they come.
            began: when the client asked, by the monotonic clock.

        Raises:
            APIError: the engine is full, has failed, or refuses one of them; none runs then.
        """
        assert self._bridge is not None, "connect comes first"
        self._require_engine()
        if self._stopped_at_once:
            self.require_service()
        self.require_room(len(requests))
        answers = Answers(
            self._bridge, len(requests), live=live, done=lambda answer: self._done(answers, answer, began)
        )
        self.open += len(requests)
        self._unfinished.add(answers)
        submitted = 0
        try:
            for answer, request in zip(answers.all, requests, strict=True):
                answer.handle = self.engine.submit(request, answer.listen)
                submitted += 1
        except (DataError, EngineError) as error:
            self._require_engine()  # it may have failed since
            raise APIError.of(error, None) from None
        finally:
            if submitted < len(requests):
                # Those that never reached the engine never end.
                self.open -= len(requests) - submitted
                self._unfinished.discard(answers)
                answers.cancel()
        return answers

    def cancel_all(self) -> None:
        """Cancels every running answer."""
        self._stopped_at_once = True
        for answers in self._unfinished:
            answers.cancel()

    def _done(self, answers: Answers, answer: Answer, began: float) -> None:
        self.open -= 1
        if not answers.open:
            self._unfinished.discard(answers)
        self.metrics.observe(answer, began)
