"""A server on a free port of this machine, in a thread, with its client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.serve.admission import Admission
from finetune.serve.app import make_app
from finetune.serve.auth import read_hosts, read_origins
from finetune.serve.metrics import Metrics
from finetune.serve.server import Server
from finetune.web.addresses import bind, url_of

if TYPE_CHECKING:
    import openai


@dataclass(frozen=True)
class Serving:
    url: str
    admission: Admission
    server: Server
    thread: threading.Thread

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def client(self, key: str = "none") -> openai.OpenAI:
        import openai  # here, because the GPU machine's measurement does without

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)


@contextlib.contextmanager
def serving(
    engine: Any,
    *,
    max_waiting: int = 256,
    body_bytes: int = 2**20,
    key: bytes | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    max_connections: int = 1000,
) -> Iterator[Serving]:
    admission = Admission(engine, Metrics(engine.stats), max_waiting=max_waiting)
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    gate: Any = {"key": key, "hosts": read_hosts(hosts, bound, key), "origins": read_origins(origins)}
    app = make_app(admission, max_body_bytes=body_bytes, **gate)
    server = Server(app, admission, max_connections=max_connections, ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    url = url_of(bound) + "/v1"
    thread.start()
    assert ready.wait(20)
    try:
        yield Serving(url, admission, server, thread)
    finally:
        if thread.is_alive():
            server.begin_stop(at_once=True)
        thread.join(20)
        assert not thread.is_alive()


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
