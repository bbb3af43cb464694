"""Serves the page: on this machine only unless told otherwise, and nothing else than what comes from it.

The browser is told to fetch nothing from elsewhere (its content security policy), and a request that names another host
is refused, so that a page of the web cannot reach in by a name that it points here.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.chat.parts import style_sheet
from finetune.errors import OutputError

_LOCAL_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
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
    """Serves a page on a listening socket.

    Args:
        stop: called by Ctrl-C, before the server waits for what it is doing: ends what runs.

    Attributes:
        url: where the page is.
    """

    def __init__(self, page: gr.Blocks, listening: socket.socket, *, stop: Callable[[], None]):
        self._listening, self._stop = listening, stop
        host, port = listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        app = Restricted(_app(page, host, port), is_local=is_local(listening))
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_PATIENCE))

    def serve_page(self) -> None:
        """Until Ctrl-C, or until `should_exit` is set from another thread."""
        self.run(sockets=[self._listening])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()
        # A page that is open holds a connection, which has to be cut; uvicorn would report that as errors.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


class Restricted:
    """Lets only requests of the page itself through, and tells the browser to ask nobody else.

    Args:
        is_local: requests come from this machine, or through a tunnel, whose port may be another.
    """

    def __init__(self, app: ASGIApp, *, is_local: bool):
        self._app, self._is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        is_known = not self._is_local or _LOCAL_NAMES.fullmatch(host) is not None
        if not is_known or (origin is not None and origin.partition("://")[2] != host):
            await PlainTextResponse("this page answers only itself\n", status_code=403)(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_policy)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        OutputError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as fault:
        raise OutputError(
            f"the page cannot be served there: {fault.strerror if isinstance(fault, OSError) else fault}",
            where=f"--host {host} --port {port}",
            fix="choose another --port (0 takes any that is free), and a --host of this machine",
        ) from None


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ip_address(listening.getsockname()[0]).is_loopback


def _app(page: gr.Blocks, host: str, port: int) -> FastAPI:
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
