"""Names in a Host header, and sockets that cannot be had."""

from __future__ import annotations

import contextlib
import resource

import pytest

from finetune.errors import FinetuneError
from finetune.web.addresses import allow_connections, bind, host_name, is_local, is_local_name, listen, url_of


@pytest.mark.parametrize(
    ("header", "name", "local"),
    [
        ("localhost:8000", "localhost", True),
        ("LocalHost.", "localhost", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.9.9.9:1", "127.9.9.9", True),
        ("[::1]:8000", "[::1]", True),
        ("[0:0:0:0:0:0:0:1]", "[0:0:0:0:0:0:0:1]", True),
        ("evil.example:80", "evil.example", False),
        ("localhost.evil.example", "localhost.evil.example", False),
        ("0.0.0.0", "0.0.0.0", False),
        ("192.168.0.1:8000", "192.168.0.1", False),
        ("[::]:8000", "[::]", False),
    ],
)
def test_names_in_a_host_header(header: str, name: str, local: bool) -> None:
    assert host_name(header) == name
    assert is_local_name(name) is local


@pytest.mark.parametrize(
    "header", ["", "::1", "a b", "http://localhost", "localhost:x", "u@localhost", "localhost/", "a,b:"]
)
def test_what_is_no_host_header(header: str) -> None:
    assert host_name(header) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a" * 70 + ".b"])
def test_an_address_that_is_not_this_machines(host: str) -> None:
    with pytest.raises(FinetuneError, match=f"cannot listen on {host} port 0: "):
        bind(host, 0)


def test_a_port_that_is_taken() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as first:
        assert is_local(first)
        listen(first)
        port = int(url_of(first).rpartition(":")[2])
        with pytest.raises(FinetuneError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            bind("127.0.0.1", port)


def test_open_files_for_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (256, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, now: limits.update(now=now))
    assert allow_connections(1000) == 1000
    assert limits["now"] == (1200, 4096)
    assert allow_connections(500) == 500
    assert limits["now"] == (1200, 4096)
    assert allow_connections(10_000) == 3896
    assert limits["now"] == (4096, 4096)
