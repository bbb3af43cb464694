"""What is refused: bodies, fields, keys, paths and numbers, each in OpenAI's form, as OpenAI's client sees it.

The engine is a fake, since nothing here reaches it.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from finetune.serve.asked import HARMLESS, REFUSED
from tests.serve.fake import FakeEngine
from tests.serve.serving import Serving, serving

KEY = "correct horse".replace(" ", "-")
BODY_BYTES = 100_000
USER = [{"role": "user", "content": "Hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with FakeEngine() as engine, serving(engine, body_bytes=BODY_BYTES, key=KEY.encode()) as server:
        yield server


def post(served: Serving, path: str = "/v1/completions", **kwargs: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **kwargs.pop("headers", {})}
    return httpx.post(served.root + path, headers=headers, timeout=20, **kwargs)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, whose form must be OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    return document["error"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "allowed: 0 to 100"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "above 0, at most 1"),
        ({"min_p": 1}, "min_p", "below 1"),
        ({"top_k": -2}, "top_k", "0 (all tokens) or more"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty", "0.01 to 100"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed: 1 or more"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "not empty"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "allowed: 0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{'type': 'text'}"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"max_token": 2}, "max_token", "did you mean max_tokens?"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": ["Hi"]}, "messages.0", "not an object"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages.0.role", "system, developer, user, assistant"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type", "parts of type text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "null, not a string"),
        ({"messages": [{"role": "user", "content": "Hi " * 256}]}, "messages", "fewer than 256"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_chat_field(served: Serving, fields: dict[str, Any], param: str, says: str) -> None:
    ask = served.client(KEY).chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="fake", messages=USER, max_tokens=2, extra_body=fields)  # type: ignore[call-overload]
    assert caught.value.param == param
    assert says in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(served: Serving) -> None:
    neutral: dict[str, Any] = {
        **{name: values[0] for name, values in REFUSED.items() if values},
        **dict.fromkeys(REFUSED.keys() - {"tool_choice"}),
        **dict.fromkeys(HARMLESS, "x"),
        **{"temperature": None, "stop": None, "n": 100, "seed": -1, "top_k": -1, "some_servers_extension": 1},
        **{"tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}},
    }
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    conversation = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    made = served.client(KEY).chat.completions.create(
        model="other", messages=conversation, max_tokens=1, extra_body=neutral
    )  # type: ignore[call-overload]
    assert len(made.choices) == 100


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"", None, "invalid JSON"),
        (b"{", None, "invalid JSON"),
        (b"\xff\xfe", None, "invalid JSON"),
        (b"[" * 50_000, None, "invalid JSON"),
        (b"[]", None, "an object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": null}', "prompt", "prompt is null"),
        (b'{"prompt": []}', "prompt", "an empty list"),
        (b'{"prompt": ["a", 1]}', "prompt", "a mixed list"),
        (b'{"prompt": [[1, 2], []]}', "prompt", "a mixed list"),
        (b'{"prompt": [true]}', "prompt", "a mixed list"),
        (b'{"prompt": [1, 32000]}', "prompt", "token id 32000; allowed: 0 to 31999"),
        (b'{"prompt": [1, -1]}', "prompt", "token id -1"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "nan"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs", "0 to 20"),
        (b'{"prompt": "a", "echo": true}', "echo", "not supported"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix", "not supported"),
        (b'{"prompt": ["a", "b", "c"], "n": 100}', "n", "300 answers; allowed: up to 260"),
        (json.dumps({"prompt": [5] * 256}).encode(), "prompt", "256 tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_body(served: Serving, body: bytes, param: str | None, says: str) -> None:
    response = post(served, content=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_a_body_that_is_not_declared_as_json(served: Serving) -> None:
    # What a form on some page in a browser could send to this machine.
    response = post(served, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert "allowed: application/json" in error_of(response)["message"]


def test_too_large_by_its_own_word(served: Serving) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.client(KEY).completions.create(model="fake", prompt="a" * BODY_BYTES)
    assert caught.value.status_code == 413
    assert f"{BODY_BYTES} bytes" in caught.value.message
    # Nothing of the body has to be sent before it is refused.
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (
        ("authorization", f"Bearer {KEY}"),
        ("content-type", "application/json"),
        ("content-length", 2**40),
    ):
        connection.putheader(name, str(value))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_too_large_in_pieces_is_refused_before_its_end(served: Serving) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        piece = b"2710\r\n" + b"a" * 10_000 + b"\r\n"
        for _ in range(BODY_BYTES // 10_000 + 1):
            connection.sendall(piece)
        # No last piece was sent, yet there is an answer.
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_the_key(served: Serving) -> None:
    for wrong in ("", "wrong", KEY + "x", KEY[:-1]):
        with pytest.raises((openai.AuthenticationError, openai.OpenAIError)) as caught:
            served.client(wrong or "x").models.list()
        assert isinstance(caught.value, openai.AuthenticationError)
        assert caught.value.code == "invalid_api_key"
    bare = httpx.get(served.url + "/models")
    assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer")
    assert error_of(bare)["code"] == "invalid_api_key"
    for path in ("/metrics", "/nowhere"):
        assert httpx.get(served.root + path).status_code == 401
    assert httpx.get(served.root + "/health").json() == {"status": "ok"}


def test_an_unknown_model(served: Serving) -> None:
    client = served.client(KEY)
    for ask in (
        lambda: client.chat.completions.create(model="gpt-4o", messages=USER),  # type: ignore[arg-type]
        lambda: client.completions.create(model="gpt-4o", prompt="Hi"),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist; there are: fake, other") as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_paths_and_methods(served: Serving) -> None:
    unknown = post(served, "/v1/embeddings", content=b"{}")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
    assert "POST /v1/embeddings" in error_of(unknown)["message"]
    method = httpx.get(served.url + "/completions", headers={"authorization": f"Bearer {KEY}"})
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert error_of(method)["code"] == "method_not_allowed"
