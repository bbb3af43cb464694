"""The command `finetune serve`: checks what it was given, loads the engine, serves until it is stopped."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from finetune.console import Report
from finetune.errors import FinetuneError
from finetune.infer import Engine
from finetune.serve.admission import Admission
from finetune.serve.app import make_app
from finetune.serve.auth import read_hosts, read_origins
from finetune.serve.metrics import Metrics
from finetune.serve.server import Server
from finetune.web import allow_connections, bind, is_local, url_of

KEY_VARIABLE = "FINETUNE_API_KEY"


def serve(
    load: Callable[[], Engine],
    report: Report,
    *,
    host: str,
    port: int,
    max_waiting: int,
    max_body_mib: float,
    max_connections: int,
    key_file: Path | None,
    allowed_hosts: Sequence[str],
    cors_origins: Sequence[str],
) -> None:
    """Serves a model until SIGTERM or SIGINT.

    Args:
        load: called once the address is had; raises as `Engine.load`.
        max_waiting: answers that may wait beyond those that decode at once.
        max_connections: clients that are connected at once.
        key_file: holds the key that clients must show.
        allowed_hosts, cors_origins: see `auth.py`.

    Raises:
        FinetuneError: a key file, address, host name, origin or model that cannot be used.
        EngineError: the engine failed for good.
    """
    key = read_key(key_file)
    origins = read_origins(cors_origins)
    with closing(bind(host, port)) as bound:
        hosts = read_hosts(allowed_hosts, bound, key)
        if key is None and not is_local(bound):
            report.line(f"warning: {host} is open to other machines, and no --api-key-file is given")
        engine = load()
        for model in engine.names:
            engine.encode_text("warm", model)  # makes the encoder, which takes half a second
        gc.freeze()  # what is loaded stays; looking through it for garbage would hold up every answer
        admission = Admission(engine, Metrics(engine.stats), max_waiting=max_waiting)
        app = make_app(admission, max_body_bytes=int(max_body_mib * 2**20), key=key, hosts=hosts, origins=origins)

        def ready() -> None:
            report.line(f"serving {', '.join(engine.names)} on {url_of(bound)}/v1 (Ctrl+C stops)")

        server = Server(app, admission, max_connections=allow_connections(max_connections), ready=ready)
        try:
            server.run(sockets=[bound])
        finally:
            gc.unfreeze()
            engine.close(drain=not server.stopped_at_once)
        if engine.failure is not None:
            raise engine.failure


def read_key(file: Path | None) -> bytes | None:
    """The API key: the file's, else the environment's FINETUNE_API_KEY, else None.

    Raises:
        FinetuneError: a file that cannot be read, a key that is empty or cannot stand in a header.
    """
    if file is None and KEY_VARIABLE not in os.environ:
        return None
    where = KEY_VARIABLE if file is None else f"--api-key-file {file}"
    try:
        key = os.environ[KEY_VARIABLE].encode() if file is None else file.read_bytes()
    except OSError as error:
        raise FinetuneError(
            f"the key file cannot be read: {error.strerror}", where=where, fix="give a file with the key in it"
        ) from None
    key = key.strip()
    if not key or any(not 0x21 <= byte <= 0x7E for byte in key):
        raise FinetuneError(
            "the API key is empty or has characters that a header cannot hold",
            where=where,
            allowed="one line of visible ASCII without spaces",
            fix="make one, for example: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return key
