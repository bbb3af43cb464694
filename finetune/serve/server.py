"""Starts and stops the HTTP server.

The first SIGTERM or SIGINT lets running answers finish while new requests hear 503; the second ends them where they
are. Sockets are bound before the model is loaded, so that a port in use is found out at once, and listen after it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from finetune.errors import FinetuneError
from finetune.serve.desk import Desk

BACKLOG = 2048
# How long clients may take, once the answers have ended, to read what was sent, and to hear 503.
FLUSH_SECONDS = 10


class Server(uvicorn.Server):
    """Serves until `begin_stop` or a signal, where it runs in the main thread.

    Args:
        ready: called once when requests are taken.

    Attributes:
        stopped_at_once: whether answers were ended before they were done.
    """

    def __init__(self, app: ASGIApp, desk: Desk, *, ready: Callable[[], None] = lambda: None):
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.stopped_at_once = False
        self._desk, self._ready = desk, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin_stop(self, *, at_once: bool = False) -> None:
        """From any thread, while it serves. The event loop looks ten times a second."""
        self._desk.stopping = True
        if at_once:
            assert self._loop is not None, "it serves"
            self.stopped_at_once = True
            self._loop.call_soon_threadsafe(self._desk.cancel_all)
            self.config.timeout_graceful_shutdown = 1
            # If the answers have ended and their clients are still reading, it does not wait for those either.
            self.force_exit = self.should_exit
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.begin_stop(at_once=self._desk.stopping)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._desk.connect(self._loop)
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        if self._desk.stopping and not self._desk.open:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._desk.disconnect()


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address that does not listen yet; port 0 takes a free one.

    Raises:
        FinetuneError: no such address on this machine, or a port that is in use or not allowed.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_bind(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_bind(host, port, error) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Lets clients connect.

    Raises:
        FinetuneError: another server took the port since it was bound.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _cannot_bind(host, port, error) from None


def url_of(bound: socket.socket) -> str:
    """Where clients find the server."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def is_local(bound: socket.socket) -> bool:
    """Whether only programs on this machine reach it."""
    return ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def _cannot_bind(host: str, port: int, error: OSError) -> FinetuneError:
    return FinetuneError(
        f"cannot listen on {host} port {port}: {error.strerror}",
        where="--host, --port",
        allowed="an address of this machine and a port that nothing listens on; --port 0 takes a free one",
        fix="choose another port, or stop what uses it",
    )
