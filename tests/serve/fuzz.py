"""Mutated bodies and mutated bytes of a connection: each must get an answer, and never one of an error in the server.

    python -m tests.serve.fuzz --cases 10000 --seed 1

`tests/serve/test_fuzz.py` runs a few hundred. The engine is a fake: a real one has tests of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import http.client
import json
import random
import socket
from collections import Counter
from typing import Any
from unittest.mock import patch

from finetune.serve import app
from finetune.web import protocol
from tests.serve.fake import FakeEngine
from tests.serve.serving import Serving, serving

CHAT: dict[str, Any] = {
    "model": "fake",
    "messages": [
        {"role": "system", "content": "Be brief.", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "</s> there"}]},
        {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "And?"},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": 2,
    "add_generation_prompt": True,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}
COMPLETION: dict[str, Any] = {"model": "other", "prompt": ["Once", "upon"], "logprobs": 1, "echo": False, "best_of": 1}
BOTH: dict[str, Any] = {
    "max_tokens": 2,
    "n": 2,
    "stream": False,
    "stream_options": None,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop": ["x"],
    "ignore_eos": True,
    "logit_bias": {},
    "user": "me",
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, 0.0, -0.0, 1e308, 5e-324, 0.5, float("nan"), float("inf"),
    "", "x", "</s>", "\ud800", "\x00", "é" * 300, "system",
    [], {}, [[]], [None], ["x"], [1], [1, "x"], {"x": 1}, {"type": "text"},
]  # fmt: skip
HEAD = (
    "POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
)


def mutated_body(draw: random.Random) -> tuple[str, bytes]:
    """A path, and a body that was right for it before one to three changes."""
    chat = draw.random() < 0.5
    document: dict[str, Any] = json.loads(json.dumps({**BOTH, **(CHAT if chat else COMPLETION)}))
    for name in list(document):
        if draw.random() < 0.4 and name not in ("messages", "prompt"):
            del document[name]
    for _ in range(draw.randint(0, 3)):
        _change(document, draw)
    body = json.dumps(document).encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        body = mutated_bytes(body, draw)
    return "chat/completions" if chat else "completions", body


def _change(document: Any, draw: random.Random) -> None:
    """Changes one place of a document: another value, one more, one less."""
    at = document
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(at[key], dict | list) and draw.random() < 0.7:
            at = at[key]
            continue
        choice = draw.random()
        if choice < 0.7:
            at[key] = copy.deepcopy(draw.choice(ODD))
        elif choice < 0.85:
            del at[key]
        else:
            at[key] = [at[key]]
        return
    if isinstance(at, dict):
        at[draw.choice(["x", "max_token", "typical_p", ""])] = copy.deepcopy(draw.choice(ODD))
    else:
        at.append(copy.deepcopy(draw.choice(ODD)))


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, doubled or left out, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, choice = draw.randrange(len(changed) + 1), draw.random()
        if choice < 0.4:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif choice < 0.6:
            changed[at:at] = draw.choice(
                [b"\r\n", b"\x00", b"[" * 300, b"9" * 5000, b": ", b"\xff\xfe", b"\xef\xbb\xbf"]
            )
        elif choice < 0.8:
            del changed[at : at + draw.randint(1, 20)]
        else:
            del changed[at:]
    return bytes(changed)


def ask_bodies(served: Serving, cases: int, draw: random.Random) -> Counter[int]:
    """How often each status was answered.

    Raises:
        AssertionError: an error in the server, or an answer that is not in OpenAI's form.
    """
    statuses: Counter[int] = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    for _ in range(cases):
        path, body = mutated_body(draw)
        connection.request("POST", f"/v1/{path}", body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        statuses[response.status] += 1
        assert response.status in (200, 400, 404, 413, 429), (response.status, path, body, data)
        if response.status != 200:
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}, (body, data)
        elif response.headers["content-type"] == "application/json":
            assert json.loads(data)["choices"], (body, data)
        else:
            assert data.endswith(b"data: [DONE]\n\n"), (body, data)
    connection.close()
    return statuses


def ask_bytes(served: Serving, cases: int, draw: random.Random) -> Counter[bytes]:
    """How often each status line came first, over connections whose bytes were changed; the server is told to hurry.

    Raises:
        AssertionError: an error in the server, or no answer at all.
    """
    lines: Counter[bytes] = Counter()
    body = b'{"prompt": "Hi", "max_tokens": 2}'
    whole = HEAD.format(path="completions", length=len(body)).encode() + body
    served.server.config.timeout_keep_alive = 0
    with (
        patch.multiple(protocol, HEAD_SECONDS=0.05, LINGER_SECONDS=0.05),
        patch.object(app, "BODY_SECONDS", 0.05),
    ):
        for _ in range(cases):
            request = whole if draw.random() < 0.1 else mutated_bytes(whole, draw)
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
                connection.sendall(request)
                data = b""
                with contextlib.suppress(ConnectionError):
                    while piece := connection.recv(2**16):
                        data += piece
            line = data.partition(b"\r\n")[0]
            assert line.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")) or not request, (request, data)
            lines[line] += 1
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="Of each kind.")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with FakeEngine() as engine, serving(engine) as served:
        print("bodies:", dict(ask_bodies(served, asked.cases, draw)))
        print("bytes:", dict(ask_bytes(served, asked.cases, draw)))


if __name__ == "__main__":
    main()
