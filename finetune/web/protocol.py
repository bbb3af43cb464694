"""One HTTP connection with limits: uvicorn's protocol, and what it leaves to a proxy in front of it.

A client that nobody knows yet costs a bounded amount of memory for a bounded time, whatever it sends:

- The head of a request (also the extension of a chunk, and the trailers) has at most `HEAD_BYTES` and `HEADERS` lines.
  uvicorn with httptools has no limit, and joins a long header piece by piece, in quadratic time.
- A head that is not whole `HEAD_SECONDS` after its first byte, or after the client connected, ends the connection, and
  so does a body of which nothing came for `BODY_SECONDS`. uvicorn's keep-alive timeout ends at the first byte.
- A client that reads nothing of its answer for `READ_SECONDS` is cut off. At most `config.limit_concurrency` clients
  are connected, and a connection queues at most `PIPELINED` requests.

How: what comes is fed to the parser in slices, and bytes are counted since the parser last made progress (a whole
head, a piece of a body, a whole message). Everything else, streaming and keep-alive among it, is upstream's.

Leaves out the length of a body and the time it may take in all: the application reads it and knows both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

HEAD_BYTES = 64 * 2**10
HEADERS = 100
PIPELINED = 16
HEAD_SECONDS = 10.0
BODY_SECONDS = 60.0
READ_SECONDS = 60.0
LINGER_SECONDS = 2.0  # a refused client gets so long to read why
GOODBYE_SECONDS = 0.2  # a request that is on its way when the server stops still gets an answer
_SLICE = 16 * 2**10


class LimitedProtocol(HttpToolsProtocol):
    """Makes one connection; `uvicorn.Config(http=LimitedProtocol)` uses it."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections_at_most = self.limit_concurrency
        self.limit_concurrency = None  # upstream says no in words of its own, and only after a whole head
        self._quiet = 0  # bytes since the parser made progress
        self._lines = 0
        self._in_body = False
        self._excess: str | None = None  # what there is too much of
        self._refused = False
        self._stopping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def refusal(self, status: int, message: str, code: str) -> tuple[str, bytes]:
        """Content type and body of an answer to what never became a request."""
        return "text/plain; charset=utf-8", f"{message}\n".encode()

    # ---- the transport's side ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._connections_at_most is not None and len(self.connections) > self._connections_at_most:
            self._refuse(503, "too many clients are connected; try again later", "too_many_connections")
            self.transport.close()  # without lingering, or they would be many all the same
        else:
            self._expect(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._unset_keepalive_if_required()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            if self._refused or self.transport.is_closing():
                return
            if not self._in_body and self._deadline is None:
                self._expect(HEAD_SECONDS, self._head_is_late)
            piece = data[start : start + _SLICE]
            self._quiet += len(piece)
            super().data_received(piece)
            if self._quiet > HEAD_BYTES:
                self._excess = f"{HEAD_BYTES} bytes of headers"
            if self._excess is not None:
                self._refuse(431, f"the request has more than {self._excess}", "headers_too_large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def shutdown(self) -> None:
        self._stopping = True
        if self._is_answering():
            super().shutdown()
        else:
            self.loop.call_later(GOODBYE_SECONDS, self._close_if_idle)

    # ---- the parser's side -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._lines = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        if self._lines > HEADERS:
            self._excess = f"{HEADERS} headers"
        elif not self._in_body:  # else it is a trailer, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._excess = f"{PIPELINED} requests before it that wait for an answer"
        if self._excess is not None:
            return
        self._in_body, self._quiet = True, 0
        self._expect(BODY_SECONDS, self._body_is_late)
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if self._excess is None:
            self._quiet = 0
            if not self.cycle.response_complete:
                self._expect(BODY_SECONDS, self._body_is_late)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._excess is None:
            self._in_body, self._quiet = False, 0
            self._expect(None)
            super().on_message_complete()
            if self.cycle.response_complete:  # upstream's own timeout ended when the rest came
                self._expect(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete:
            # Answered before it was whole. The client may finish what it sends, to be able to read the answer.
            self._expect(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not an HTTP request", "bad_request")

    # ---- limits ------------------------------------------------------------------------------------------------

    def _expect(self, seconds: float | None, else_do: Callable[[], None] | None = None) -> None:
        """Something has to happen within so many seconds; None: nothing has to."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            assert else_do is not None
            self._deadline = self.loop.call_later(seconds, else_do)

    def _head_is_late(self) -> None:
        self._deadline = None
        if self._is_answering():
            return  # the next request's; looked at again when more of it comes
        if self._quiet:
            self._refuse(408, f"the headers took longer than {HEAD_SECONDS:g} s", "request_timeout")
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        self._deadline = None
        if self.flow.read_paused:  # by ourselves
            self._expect(BODY_SECONDS, self._body_is_late)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        """Ends the connection under an application that waits for more of the body, or writes."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self.transport.close()

    def _wait_for_reader(self, unread: int) -> None:
        self._reading = self.loop.call_later(READ_SECONDS, self._look_after_reader, unread)

    def _look_after_reader(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._wait_for_reader(unread)
        else:
            self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_idle(self) -> None:
        if not self._is_answering() and not self._quiet and not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Says why, and ends the connection; what still comes is thrown away."""
        if self._refused:
            return
        self._refused = True
        self._expect(None)
        if self._is_answering():
            # Nothing can be said in the middle of another answer, so the connection ends after it.
            if self._in_body and not self.pipeline:
                self._hang_up()
            self.cycle.keep_alive = False
            return
        kind, body = self.refusal(status, message, code)
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {kind}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode("ascii") + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._unset_keepalive_if_required()
        self._expect(LINGER_SECONDS, self.transport.close)
