"""Full, stopping, dead, and clients that leave: on an engine that waits for the test."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from finetune.serve.admission import Admission
from finetune.serve.app import make_app
from finetune.serve.metrics import Metrics
from finetune.serve.server import Server
from finetune.web.addresses import bind
from tests.serve.fake import FakeEngine
from tests.serve.serving import Serving, eventually, serving


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(max_batch=2) as made:
        yield made


@pytest.fixture
def served(engine: FakeEngine) -> Iterator[Serving]:
    with serving(engine, max_waiting=1) as server:
        yield server


def ask(served: Serving, **fields: object) -> object:
    return served.client().completions.create(model="fake", prompt="Hi", **fields)  # type: ignore[call-overload]


def test_one_too_many_waiting(engine: FakeEngine, served: Serving) -> None:
    engine.hold(True)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask, served, max_tokens=3) for _ in range(3)]
        assert eventually(lambda: served.admission.open == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(served)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 0
        text = httpx.get(served.root + "/metrics").text
        assert "finetune_running 2.0" in text
        assert "finetune_waiting 1.0" in text
        engine.hold(False)
        assert [done.result(20).choices[0].text for done in running] == ["0 1 2 "] * 3
    assert served.admission.open == 0
    ask(served)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(engine: FakeEngine, served: Serving, stream: bool) -> None:
    engine.hold(True)
    body = json.dumps({"prompt": "Hi", "stream": stream, "n": 2})
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    assert eventually(lambda: engine.stats().running == 2)
    connection.close()
    assert eventually(lambda: engine.stats().running == 0)
    assert eventually(lambda: served.admission.open == 0)
    sample = f'finetune_requests_total{{endpoint="/v1/completions",status="{200 if stream else 499}"}} 1.0'
    assert eventually(lambda: sample in httpx.get(served.root + "/metrics").text)


def test_a_dead_engine(engine: FakeEngine, served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks hears 503, and then the server ends."""
    monkeypatch.setattr("finetune.serve.server.FAILED_SECONDS", 1.0)
    engine.hold(True)
    failed: list[openai.APIError] = []

    def listen() -> None:
        try:
            for _ in ask(served, stream=True):  # type: ignore[attr-defined]
                pass
        except openai.APIError as error:
            failed.append(error)

    listening = threading.Thread(target=listen)
    listening.start()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, served)
        assert eventually(lambda: served.admission.open == 2)
        engine.fail()
        listening.join(20)
        with pytest.raises(openai.InternalServerError) as caught:
            whole.result(20)
    assert [error.code for error in failed] == ["engine_failed"]
    assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
    with pytest.raises(openai.InternalServerError):
        ask(served)
    health = httpx.get(served.root + "/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_failed")
    served.thread.join(20)
    assert not served.thread.is_alive()


def test_stopping_lets_answers_finish_and_takes_no_more(engine: FakeEngine, served: Serving) -> None:
    engine.hold(True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, served, max_tokens=3)
        assert eventually(lambda: served.admission.open == 1)
        served.server.begin_stop()
        with pytest.raises(openai.InternalServerError) as caught:
            ask(served)
        assert (caught.value.status_code, caught.value.code) == (503, "stopping")
        assert httpx.get(served.root + "/health").status_code == 503
        assert served.thread.is_alive()
        engine.hold(False)
        assert running.result(20).choices[0].text == "0 1 2 "
    served.thread.join(20)
    assert not served.thread.is_alive()
    assert not served.server.stopped_at_once


def test_what_was_let_in_before_a_stop_is_answered(
    engine: FakeEngine, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose prompt is still being encoded, and one whose body is not there yet."""
    encode, encodes, go_on = engine.encode_text, threading.Event(), threading.Event()

    def slowly(text: str, model: str | None = None) -> tuple[int, ...]:
        encodes.set()
        go_on.wait(20)
        return encode(text)

    monkeypatch.setattr(engine, "encode_text", slowly)
    body = b'{"prompt": "Hi", "max_tokens": 2}'
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(len(body)))
    connection.endheaders()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, served, max_tokens=3)
        assert encodes.wait(20)
        assert eventually(lambda: served.admission.entered == 2)
        served.server.begin_stop()
        time.sleep(0.3)
        assert served.thread.is_alive()
        go_on.set()
        assert running.result(20).choices[0].text == "0 1 2 "  # type: ignore[attr-defined]
    connection.send(body)
    assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "0 1 "
    served.thread.join(20)
    assert not served.thread.is_alive()


def test_clients_in_the_queue_of_the_port_hear_503(engine: FakeEngine) -> None:
    """They connected before the server's loop ran, and the stop came as soon."""
    admission = Admission(engine, Metrics(engine.stats), max_waiting=1)  # type: ignore[arg-type]
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for _ in range(20)]

        def ready() -> None:
            for connection in connections:
                connection.request("POST", "/v1/completions", b"{}", {"content-type": "application/json"})
            server.begin_stop()
            asked.set()

        asked = threading.Event()
        server = Server(make_app(admission, max_body_bytes=100, key=None), admission, ready=ready)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert asked.wait(20)
        assert [connection.getresponse().status for connection in connections] == [503] * 20
        thread.join(20)
        assert not thread.is_alive()


def test_a_signal_that_is_passed_on_is_one_signal(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("finetune.serve.server.monotonic", lambda: now)
    server = Server(served.server.config.app, served.admission)
    server.handle_exit(signal.SIGTERM, None)
    now += 0.5
    server.handle_exit(signal.SIGTERM, None)
    assert served.admission.stopping
    assert not server.stopped_at_once
    now += 1.0
    server.handle_exit(signal.SIGTERM, None)
    assert server.stopped_at_once


def test_stopping_at_once_tells_the_clients(engine: FakeEngine, served: Serving) -> None:
    engine.hold(True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, served)
        assert eventually(lambda: served.admission.open == 1)
        served.server.begin_stop(at_once=True)
        with pytest.raises(openai.InternalServerError) as caught:
            running.result(20)
    assert caught.value.code == "stopping"
    served.thread.join(20)
    assert served.server.stopped_at_once
