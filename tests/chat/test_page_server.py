"""How the page is served, without a browser and without gradio: whom it answers, and what a connection may cost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from finetune.chat import page_server
from finetune.web import protocol
from finetune.web.addresses import bind


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("page"))])
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(bind("127.0.0.1", 0)) as bound:
        patch.setattr(page_server, "_app", lambda *_: app)
        server = page_server.PageServer(None, bound, stop=lambda: None)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_page)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server.url
        server.should_exit = True
        thread.join()


def test_it_answers_itself_and_nobody_else(url: str) -> None:
    here = url.removeprefix("http://").rstrip("/")
    for headers in ({}, {"host": "LOCALHOST:80"}, {"host": "[::1]:7860"}, {"origin": f"http://{here}"}):
        response = httpx.get(url, headers=headers)
        assert (response.status_code, response.text) == (200, "page")
        assert "default-src 'self'" in response.headers["content-security-policy"]
    for headers in ({"host": "evil.example"}, {"host": "localhost.evil.example"}, {"origin": "http://evil.example"}):
        response = httpx.get(url, headers=headers)
        assert (response.status_code, response.text) == (403, "this page answers only itself\n")


def test_its_connections_are_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    for sent, said in (
        (
            b"GET / HTTP/1.1\r\nx: " + b"a" * 2 * protocol.HEAD_BYTES,
            b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
        ),
        (b"GET / HTTP/1.1\r\nx: ", b"HTTP/1.1 408 Request Timeout\r\n"),
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            assert connection.recv(2**16).startswith(said)
