"""The command: what it refuses before it loads anything, and a real process from its first line to its last."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import REPOSITORY
from tests.running import refused
from tests.serve.fake import MODEL


@pytest.mark.parametrize("text", ["support", "=runs/adapter", "support=", " =x"])
def test_a_bad_adapter(tmp_path: Path, text: str) -> None:
    says = (f"--adapter {text!r} does not name an adapter", "NAME=PATH")
    refused(tmp_path, "serve", MODEL, "--adapter", text, says=says)


def test_two_adapters_of_one_name(tmp_path: Path) -> None:
    args = ("--adapter", "a=x", "--adapter", "a=y")
    refused(tmp_path, "serve", MODEL, *args, says=("the name a is given to two adapters",))


def test_a_key_file_that_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "key"
    says = ("cannot be read: No such file", f"--api-key-file {file}")
    refused(tmp_path, "serve", MODEL, "--api-key-file", file, says=says)


@pytest.mark.parametrize("key", ["", " \n", "two words", "schlüssel", "a\nb"])
def test_a_key_that_cannot_stand_in_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    says = ("the API key is empty or has characters", "visible ASCII")
    refused(tmp_path, "serve", MODEL, "--api-key-file", file, says=says)
    monkeypatch.setenv("FINETUNE_API_KEY", key)
    refused(tmp_path, "serve", MODEL, says=(*says, "where: FINETUNE_API_KEY"))


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = (f"cannot listen on 127.0.0.1 port {port}: ", "--port 0 takes a free one")
        refused(tmp_path, "serve", MODEL, "--port", port, says=says)


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    refused(tmp_path, "serve", MODEL, "--host", "192.0.2.1", says=("cannot listen on 192.0.2.1",))


def test_an_open_address_without_a_key_is_warned_of(tmp_path: Path) -> None:
    args = ("serve", tmp_path / "no-model", "--host", "0.0.0.0", "--port", 0)
    ran = refused(tmp_path, *args, says=("no-model",))
    assert "warning: 0.0.0.0 is open to other machines, and no --api-key-file is given" in ran.stdout
    key = tmp_path / "key"
    key.write_text("secret")
    assert "warning" not in refused(tmp_path, *args, "--api-key-file", key, says=("no-model",)).stdout


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.errors.find_spec", lambda name: None if name == "httptools" else name)
    refused(tmp_path, "serve", MODEL, says=("not installed: httptools\n", "pip install -e '.[serve]'"))


@contextmanager
def started(
    model: Path, *args: object, program: Sequence[str] = ("-m", "finetune")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves the model, and its base URL."""
    command = [sys.executable, *program, "serve", model, "--port", 0, "--device", "cpu", *args]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving "):
                break
        else:
            pytest.fail("".join(lines))
        assert line.startswith("serving talkative on http://127.0.0.1:")
        yield process, line.split()[3]
    finally:
        process.kill()
        process.wait()


def test_a_process_that_is_asked_to_stop_while_it_answers(talkative: Path, tmp_path: Path) -> None:
    """20 streams are whole, though SIGTERM comes twice, as `timeout` and other launchers send it."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    with (
        started(talkative, "--api-key-file", key, "--kv-gib", "0.25") as (process, url),
        ThreadPoolExecutor(20) as pool,
    ):
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="guess").models.list()
        fields: Any = {"model": "talkative", "prompt": "Once", "max_tokens": 60, "extra_body": {"ignore_eos": True}}
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        refusals: list[int] = []

        def ask_until_refused() -> None:
            try:
                while True:
                    client.completions.create(model="talkative", prompt="Once", max_tokens=1)
            except openai.APIStatusError as error:
                refusals.append(error.status_code)

        answers = list(pool.map(lambda _: client.completions.create(**fields), range(20)))
        asking = threading.Thread(target=ask_until_refused)
        asking.start()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        whole = list(pool.map(list, answers))
        asking.join(60)
        assert [pieces[-2].choices[0].finish_reason for pieces in whole] == ["length"] * 20
        assert [pieces[-1].usage.completion_tokens for pieces in whole] == [60] * 20
        assert refusals == [503]
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


# The command itself, on a device that is lost with the first step.
DYING = """
import runpy
from finetune.infer.runner import Runner
from finetune.serve import server

def lost(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access")

Runner.step = Runner.probe = lost
server.FAILED_SECONDS = 0.5
runpy.run_module("finetune", run_name="__main__")
"""


def test_a_process_whose_engine_dies_tells_why_and_does_not_succeed(talkative: Path) -> None:
    with started(talkative, "--kv-gib", "0.25", program=("-c", DYING)) as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="talkative", prompt="Once", max_tokens=4)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
        assert process.wait(60) == 2
        assert process.stdout is not None
        said = process.stdout.read()
    error = said[said.rindex("\nerror: ") + 1 :]
    assert error == (
        "error: the engine failed while it answered: RuntimeError: CUDA error: an illegal memory access\n"
        f"  where: {talkative}\n  fix: start it again; the traceback is in the log\n"
    )
    assert "Traceback" in said[: -len(error)]


@pytest.mark.slow
def test_a_signal_as_soon_as_the_port_is_open(talkative: Path) -> None:
    """20 clients that connect the moment they can, and SIGTERM at once: each hears an answer, whole or 503."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = b'{"prompt": "Once", "max_tokens": 20, "stream": true, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    command = [sys.executable, "-m", "finetune", "serve", str(talkative), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        connections: list[socket.socket] = []
        while len(connections) < 20:
            assert process.poll() is None
            with contextlib.suppress(ConnectionRefusedError):
                connections.append(socket.create_connection(("127.0.0.1", port), timeout=60))
                connections[-1].sendall(head + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        process.send_signal(signal.SIGTERM)
        for connection in connections:
            with connection:
                data = b""
                while not (data.endswith(b"0\r\n\r\n") or data.endswith(b"}}")):
                    piece = connection.recv(2**16)
                    assert piece, data
                    data += piece
            assert data.count(b'"finish_reason": "length"') == 1 or data.startswith(b"HTTP/1.1 503 ")
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--allowed-host", "http://models.example.org/", ("is not a host name", "without http:// and without a path")),
        ("--cors-origin", "app.example.org", ("is not an origin", "https://app.example.org")),
        ("--cors-origin", "https://app.example.org/path", ("is not an origin", "without a path")),
    ],
)
def test_a_name_or_an_origin_that_is_none(tmp_path: Path, option: str, value: str, says: tuple[str, ...]) -> None:
    refused(tmp_path, "serve", MODEL, "--port", 0, option, value, says=(*says, option))
