"""Starts and stops the HTTP server.

The first SIGTERM or SIGINT lets every admitted request finish while new ones get 503; the second cancels them. Sockets
are bound before the model is loaded, so that a port in use is found at once. They listen after it, and only once
signals are handled: no client is ever connected to a process that a signal would kill on the spot. When the engine has
failed for good, clients get 503 for some seconds; then the server exits, so that a supervisor starts another.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from finetune.serve.admission import Admission
from finetune.serve.api_error import APIError
from finetune.web import BACKLOG, LimitedProtocol, listen

# How long clients may take, once the answers have ended, to read what was sent, and to hear 503.
FLUSH_SECONDS = 10
# How long clients get 503 after the engine has failed.
FAILED_SECONDS = 5.0
# Tenths of a second without work before a stop closes the port: whoever had just connected still hears 503.
IDLE_TICKS = 3
# A launcher such as `timeout` signals the process and its group; what comes again within this time is the same signal.
RELAYED_SECONDS = 1.0


class ServeProtocol(LimitedProtocol):
    """Sends errors in OpenAI's form."""

    def refusal(self, status: int, message: str, code: str) -> tuple[str, bytes]:
        return "application/json", APIError(status, message, code=code).body()


class Server(uvicorn.Server):
    """Serves until `begin_stop` or a signal, where it runs in the main thread.

    Args:
        max_connections: clients that are connected at once.
        ready: called once, when requests are accepted.

    Attributes:
        stopped_at_once: whether running answers were cancelled.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        *,
        max_connections: int = 1000,
        ready: Callable[[], None] = lambda: None,
    ):
        config = uvicorn.Config(
            app,
            http=ServeProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.stopped_at_once = False
        self._admission, self._ready = admission, ready
        self._asked_at = -math.inf
        self._idle_ticks = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: float | None = None

    def begin_stop(self, *, at_once: bool = False) -> None:
        """Begins to stop; may be called from any thread. The event loop checks ten times a second."""
        self._admission.stopping = True
        if at_once:
            self.stopped_at_once = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._admission.cancel_all)
            self.config.timeout_graceful_shutdown = 1
            # If the answers have ended and their clients are still reading, it does not wait for those either.
            self.force_exit = self.should_exit
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = monotonic()
        if now >= self._asked_at + RELAYED_SECONDS:
            self._asked_at = now
            self.begin_stop(at_once=self._admission.stopping)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._admission.connect(self._loop)
        for bound in sockets or ():
            listen(bound)
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        if self._admission.engine.failure is not None and self._ends is None:
            self._ends = now + FAILED_SECONDS
        idle = self._admission.stopping and not (self._admission.open or self._admission.entered)
        self._idle_ticks = self._idle_ticks + 1 if idle else 0
        if self._idle_ticks >= IDLE_TICKS or (self._ends is not None and now >= self._ends):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._admission.disconnect()
