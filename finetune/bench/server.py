"""`finetune bench server`: tokens a second that clients of a running server get, over HTTP.

Any server with OpenAI's `/v1/completions` can be asked. Each client is a thread with one streaming request of random
token ids; the time between steps is read as `finetune bench decode` reads it, so that the two figures tell what the
server costs: median time between the tokens of the last client, from where all of them stream.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from finetune.bench.result import rounded
from finetune.console import Report
from finetune.errors import FinetuneError


def bench_server(
    url: str,
    report: Report,
    *,
    clients: int = 16,
    context: int = 128,
    tokens: int = 128,
    vocab: int = 32000,
    model: str | None = None,
    api_key: str | None = None,
) -> dict[str, Any]:
    """Measures and prints the table; returns the JSON line's content.

    Raises:
        FinetuneError: the server cannot be reached, or refuses.
    """
    runs = [_Client(url, seed, context, tokens, vocab, model, api_key) for seed in range(clients)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    failed = [run.failure for run in runs if run.failure is not None]
    if failed:
        raise FinetuneError(
            f"{len(failed)} of {clients} requests failed: {failed[0]}",
            where=url,
            fix="start a server (finetune serve MODEL), and allow it as many requests as clients are asked for",
        )
    begun = max(run.times[0] for run in runs)
    ended = min(run.times[-1] for run in runs)
    steps = [
        after - before
        for run in runs
        for before, after in itertools.pairwise([moment for moment in run.times if begun <= moment <= ended])
    ]
    seconds = statistics.median(steps)
    first = statistics.median(run.times[0] - run.begun for run in runs)
    document = {
        "bench": "server",
        "clients": clients,
        "context": context,
        "tokens": tokens,
        "step_seconds": rounded(seconds),
        "tokens_per_second": rounded(clients / seconds),
        "first_token_seconds": rounded(first),
    }
    report.table(
        f"{clients} clients of {url}",
        ("what", "value"),
        [
            ("tokens/s in all, while all stream", f"{clients / seconds:,.0f}"),
            ("ms between a client's tokens", f"{seconds * 1e3:.2f}"),
            ("ms to the first token, median", f"{first * 1e3:,.0f}"),
        ],
    )
    return document


class _Client(threading.Thread):
    """One streaming request; keeps when its tokens came."""

    def __init__(
        self, url: str, seed: int, context: int, tokens: int, vocab: int, model: str | None, api_key: str | None
    ):
        super().__init__(daemon=True)
        draw = random.Random(seed)
        self.body: dict[str, Any] = {
            "prompt": [draw.randrange(3, vocab) for _ in range(context)],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        self.where, self.model, self.api_key = urlsplit(url), model, api_key
        self.times: list[float] = []
        self.begun = 0.0
        self.failure: str | None = None

    def run(self) -> None:
        try:
            self._ask()
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self.failure = f"{type(error).__name__}: {error}"
        if self.failure is None and len(self.times) < 2:
            self.failure = "the answer ended after fewer than two tokens"

    def _ask(self) -> None:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        connection = http.client.HTTPConnection(self.where.hostname or "127.0.0.1", self.where.port, timeout=600)
        if self.model is None:
            connection.request("GET", "/v1/models", headers=headers)
            self.model = json.loads(connection.getresponse().read())["data"][0]["id"]
        self.begun = time.perf_counter()
        body = json.dumps({**self.body, "model": self.model})
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            self.failure = f"status {response.status}: {response.read(300).decode(errors='replace')}"
            return
        for line in response:
            if line.startswith(b"data: {"):
                self.times.append(time.perf_counter())
