"""Serves the page, by default only to this machine.

A content security policy tells the browser to fetch nothing from elsewhere. A request that names another host is
refused, so that a web page cannot reach in through a name that it points here (DNS rebinding). What a connection may
cost is bounded as for the HTTP server (`web/protocol.py`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.chat.parts import style_sheet
from finetune.web import LimitedProtocol, host_name, is_local, is_local_name, url_of

if TYPE_CHECKING:
    import gradio as gr

_CONNECTIONS = 200  # a browser opens six for each tab
_PATIENCE = 1  # seconds that open connections get at the end; a page holds one for as long as it is open
_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page begins with scripts of its own, and its components make functions of their templates.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "form-action 'self'",
    )
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


class PageServer(uvicorn.Server):
    """Serves a page on a socket.

    Args:
        stop: called on Ctrl-C, before the server waits for running requests; stops the answers.

    Attributes:
        url: where the page is.
    """

    def __init__(self, page: gr.Blocks, bound: socket.socket, *, stop: Callable[[], None]):
        self._bound, self._stop = bound, stop
        host, port = bound.getsockname()[:2]
        self.url = f"{url_of(bound)}/"
        config = uvicorn.Config(
            Restricted(_app(page, host, port), is_local=is_local(bound)),
            http=LimitedProtocol,
            limit_concurrency=_CONNECTIONS,
            log_level="warning",
            timeout_graceful_shutdown=_PATIENCE,
        )
        super().__init__(config)

    def serve_page(self) -> None:
        """Serves until Ctrl-C, or until `should_exit` is set from another thread."""
        self.run(sockets=[self._bound])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()
        # A page that is open holds a connection, which has to be cut; uvicorn would report that as errors.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


class Restricted:
    """Lets only requests of the page itself through, and forbids the browser to contact anybody else.

    Args:
        is_local: whether requests come from this machine or through a tunnel, whose port may differ.
    """

    def __init__(self, app: ASGIApp, *, is_local: bool):
        self._app, self._is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host_name(host)
        is_known = not self._is_local or (name is not None and is_local_name(name))
        if not is_known or (origin is not None and origin.partition("://")[2].lower() != host.lower()):
            await PlainTextResponse("this page answers only itself\n", status_code=403)(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_policy)


def _app(page: gr.Blocks, host: str, port: int) -> FastAPI:
    import gradio as gr

    fonts = ["system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", font=fonts, font_mono=mono),
        css=style_sheet(),
    )
