"""A few hundred of the mutated requests of `fuzz.py`."""

from __future__ import annotations

import logging
import random

import httpx
import pytest

from tests.serve.fake import FakeEngine
from tests.serve.fuzz import ask_bodies, ask_bytes
from tests.serve.serving import serving


def test_mutated_requests_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    with FakeEngine() as engine, serving(engine) as served:
        statuses = ask_bodies(served, 300, random.Random(0))
        assert {200, 400} <= set(statuses)
        lines = ask_bytes(served, 100, random.Random(0))
        assert {b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"} <= set(lines)
        response = httpx.post(served.url + "/completions", json={"prompt": "Hi", "max_tokens": 2})
        assert response.json()["choices"][0]["text"] == "0 1 "
        assert served.admission.open == served.admission.entered == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
