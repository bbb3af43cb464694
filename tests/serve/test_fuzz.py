"""Connections whose bytes were changed: each gets an answer, and never one of an error in the server.

Changed bodies are one of the kinds of `scripts/fuzz.py`. The engine is a fake: a real one has tests of its own.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket

import httpx
import pytest

from finetune.web import protocol
from tests.serve.fake import FakeEngine
from tests.serve.serving import serving

BODY = b'{"prompt": "Hi", "max_tokens": 2}'
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
WHOLE = HEAD % len(BODY) + BODY


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, doubled or left out, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, choice = draw.randrange(len(changed) + 1), draw.random()
        if choice < 0.4:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif choice < 0.6:
            changed[at:at] = draw.choice([b"\r\n", b"\x00", b"[" * 300, b"9" * 5000, b": ", b"\xff\xfe"])
        elif choice < 0.8:
            del changed[at : at + draw.randint(1, 20)]
        else:
            del changed[at:]
    return bytes(changed)


def test_mutated_requests_are_answered(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, lines = random.Random(0), set()
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr("finetune.serve.app.BODY_SECONDS", 0.05)
    with FakeEngine() as engine, serving(engine) as served:
        served.server.config.timeout_keep_alive = 0
        for _ in range(100):
            request = WHOLE if draw.random() < 0.1 else mutated(WHOLE, draw)
            data = b""
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
                connection.sendall(request)
                with contextlib.suppress(ConnectionError):
                    while piece := connection.recv(2**16):
                        data += piece
            line = data.partition(b"\r\n")[0]
            assert line.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")) or not request, (request, data)
            lines.add(line)
        assert {b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"} <= lines
        response = httpx.post(served.url + "/completions", json={"prompt": "Hi", "max_tokens": 2})
        assert response.json()["choices"][0]["text"] == "0 1 "
        assert served.admission.open == served.admission.entered == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
