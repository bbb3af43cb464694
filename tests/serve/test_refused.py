"""What is refused: bodies, fields, keys, paths and numbers, each in OpenAI's form, as OpenAI's client sees it.

The engine is a fake, since nothing here reaches it.
"""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from finetune.serve.api_error import APIError
from finetune.serve.fields import HARMLESS, REFUSED, refuse_extras
from finetune.serve.request_body import ChatCompletionRequest, CompletionRequest
from tests.conftest import REPOSITORY
from tests.serve.fake import FakeEngine
from tests.serve.serving import Serving, serving

KEY = "correct horse".replace(" ", "-")
BODY_BYTES = 100_000
CLIENT = httpx.Client(timeout=20)  # one, because its certificates take 30 ms to load
USER = [{"role": "user", "content": "Hi"}]
PREFILL = [*USER, {"role": "assistant", "content": "Well"}]
LONGEST = "This model's maximum context length is 256 tokens. However, your messages "
DEEP = '{"a":' * 2_000
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with FakeEngine() as engine, serving(engine, body_bytes=BODY_BYTES, key=KEY.encode()) as server:
        yield server


def post(served: Serving, path: str = "/v1/completions", **kwargs: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **kwargs.pop("headers", {})}
    return CLIENT.post(served.root + path, headers=headers, **kwargs)


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
        *(
            ({name: value}, name, f"{name} is not supported")
            for name, value in (
                ("grammar", "root ::= x"),
                ("json_schema", {"type": "object"}),
                ("include_stop_str_in_output", True),
                ("truncate_prompt_tokens", 5),
                ("typical_p", 0.5),
                ("mirostat", 2),
                ("chat_template_kwargs", {"enable_thinking": False}),
                ("functions", [{"name": "f"}]),
                ("reasoning_effort", "high"),
                ("repeat_penalty", 1.1),
                ("add_special_tokens", True),
                ("n_predict", 5),
                ("min_tokens", True),
            )
        ),
        ({"some_servers_extension": 1}, "some_servers_extension", "leave it out"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "",
        ),
        ({"messages": [{**USER[0], "images": ["x"]}]}, "messages.0.images", "not supported"),
        ({"messages": [{**USER[0], "reasoning_content": "x"}]}, "messages.0.reasoning_content", "not supported"),
        ({"messages": [{**USER[0], "contents": "x"}]}, "messages.0.contents", "did you mean content?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages.0.content.0.x",
            "",
        ),
        ({"add_generation_prompt": False}, "add_generation_prompt", "which is not the assistant's"),
        ({"continue_final_message": True}, "continue_final_message", "which is not the assistant's"),
        ({"messages": PREFILL, "continue_final_message": False}, "continue_final_message", "says otherwise"),
        ({"messages": PREFILL, "add_generation_prompt": True}, "add_generation_prompt", "says otherwise"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": USER * 2049}, "messages", "at most 2048 items"),
        ({"messages": ["Hi"]}, "messages.0", "not an object"),
        (
            {"messages": [{"role": "bot", "content": "4"}]},
            "messages.0.role",
            "system, developer, user, assistant, tool",
        ),
        ({"messages": [{**USER[0], "tool_calls": [{"name": "f"}]}]}, "messages.0", "role 'user' calls tools"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1", "does not name a function"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "messages.1.tool_calls",
            "add what they answered",
        ),
        ({"messages": [{"role": "tool", "content": "4"}, *USER]}, "messages", "a tool answers where nothing called it"),
        ({"tools": [{"name": "f"}]}, "tools", "lists them where it knows tools: mistral-v1, mistral-v3 and chatml"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]}]},
            "messages.1",
            "the arguments of a tool call are JSON that is nested too deeply",
        ),
        ({"tools": [{}], "tool_choice": "none"}, "tools", "does not name a function"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type", "parts of type text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "null, not a string"),
        ({"messages": [{"role": "user", "content": "Hi " * 256}]}, "messages", f"{LONGEST}resulted in 258 tokens."),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "messages", f"{LONGEST}resulted in 5000 characters"),
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
        **{"temperature": None, "stop": None, "n": 100, "seed": -1, "top_k": -1, "add_special_tokens": False},
        **{"add_generation_prompt": True, "continue_final_message": False},
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
        (b"\xff\xfe", None, "the body is UTF-16"),
        (b"[" * 10_000, None, "invalid JSON: recursion limit"),
        (b"[" * 90_000, None, "too many lists and objects; allowed: 20000"),
        (b"[]", None, "an object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": null}', "prompt", "prompt is null"),
        (b'{"prompt": []}', "prompt", "an empty list"),
        (b'{"prompt": ["a", 1]}', "prompt", "a mixed list"),
        (b'{"prompt": [[1, 2], []]}', "prompt", "a mixed list"),
        (b'{"prompt": [true]}', "prompt", "a mixed list"),
        (b'{"prompt": [1, 32000]}', "prompt", "token id 32000; allowed: 0 to 31999"),
        (b'{"prompt": [1, -1]}', "prompt", "token id -1"),
        (b'{"prompt": "a", "temperature": NaN}', None, "invalid JSON: expected value"),
        (b'{"prompt": "a", "user": NaN}', None, "invalid JSON"),
        (b'{"prompt": "a", "temperature": 1e400}', "temperature", "temperature is inf"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", None, "number out of range"),
        (b'{"prompt": "a", "top_k": ' + b"1" * 400 + b"}", "top_k", "less than"),
        (b'{"prompt": [' + b"1" * 400 + b"]}", "prompt", "token id 1111"),
        (b'{"prompt": "\xff"}', None, "not UTF-8"),
        (b'{"prompt": "\\ud800"}', None, "hex escape"),
        ('{"prompt": "a"}'.encode("utf-16"), None, "the body is UTF-16; allowed: JSON in UTF-8; send it as UTF-8"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), None, "is gzip; allowed: JSON in UTF-8; send it uncompressed"),
        (b'{"prompt": [' + b"[1]," * 10_000 + b"[1]]}", "n", "10001 answers"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs", "0 to 20"),
        (b'{"prompt": "a", "echo": true}', "echo", "not supported"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix", "not supported"),
        (b'{"prompt": ["a", "b", "c"], "n": 100}', "n", "300 answers; allowed: up to 260"),
        (json.dumps({"prompt": [5] * 256}).encode(), "prompt", "your prompt resulted in 256 tokens."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_body(served: Serving, body: bytes, param: str | None, says: str) -> None:
    response = post(served, content=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        # What a form on some page in a browser could send to this machine.
        (
            {"content-type": "text/plain"},
            "the content-type is 'text/plain'; allowed: application/json; send the header",
        ),
        (
            {"content-type": "application/json; charset=latin-1"},
            "the charset is 'latin-1'; allowed: utf-8; send the body as UTF-8",
        ),
        ({"content-encoding": "gzip"}, "the content-encoding is 'gzip'; allowed: identity; send the body uncompressed"),
        ({"content-encoding": "deflate"}, "the content-encoding is 'deflate'"),
    ],
)
def test_a_body_that_is_not_declared_as_json(served: Serving, headers: dict[str, str], says: str) -> None:
    response = post(served, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert says in error_of(response)["message"]


def test_a_byte_order_mark_and_a_charset_are_no_reason(served: Serving) -> None:
    headers = {"content-type": 'application/json; charset="UTF-8"'}
    response = post(served, content=b"\xef\xbb\xbf" + b'{"prompt": "a", "max_tokens": 2}', headers=headers)
    assert response.json()["choices"][0]["text"] == "0 1 "


def test_tools_that_are_not_to_be_called(served: Serving) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    fields: dict[str, Any] = {"model": "fake", "messages": USER, "max_tokens": 2, "tools": [tool]}
    [choice] = served.client(KEY).chat.completions.create(**fields, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == ("0 1 ", None)
    with pytest.raises(openai.BadRequestError, match="tool_choice: 'none' has the model answer without them"):
        served.client(KEY).chat.completions.create(**fields)


def test_every_field_of_openais_own_client_has_its_place() -> None:
    from openai.types import completion_create_params as text
    from openai.types.chat import chat_completion_stream_options_param as options
    from openai.types.chat import completion_create_params as chat

    assert set(options.ChatCompletionStreamOptionsParam.__annotations__) == {"include_usage", "include_obfuscation"}
    for asked, theirs in ((ChatCompletionRequest, chat), (CompletionRequest, text)):
        fields = set(theirs.CompletionCreateParamsBase.__annotations__)
        known = set(asked.model_fields) | set(asked.refused) | HARMLESS
        assert fields <= known
        assert not set(asked.model_fields) & (set(asked.refused) | HARMLESS)
    assert not HARMLESS & set(REFUSED)


def test_a_true_is_not_a_one() -> None:
    refuse_extras({"best_of": 1, "echo": False, "typical_p": 1.0}, REFUSED, HARMLESS, ())
    for extras in ({"best_of": True}, {"echo": 0}):
        with pytest.raises(APIError, match="is not supported"):
            refuse_extras(extras, REFUSED, HARMLESS, ())


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
        with pytest.raises(openai.NotFoundError, match="does not exist; available: fake, other") as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_paths_and_methods(served: Serving) -> None:
    unknown = post(served, "/v1/embeddings", content=b"{}")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
    assert "POST /v1/embeddings" in error_of(unknown)["message"]
    method = httpx.get(served.url + "/completions", headers={"authorization": f"Bearer {KEY}"})
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert error_of(method)["code"] == "method_not_allowed"


def test_the_documented_list_of_what_is_harmless() -> None:
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    listed = text.partition("because they cannot change the answer:")[2].partition(".")[0]
    assert {name.strip("` \n") for name in listed.split(",")} == HARMLESS
