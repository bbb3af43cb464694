"""What the server costs the engine: the same answers asked of the engine directly and over HTTP, in turns.

    python -m tests.serve.overhead MODEL --clients 16 --tokens 256
    python -m tests.serve.overhead recipes/mixtral-8x7b/shape --random-weights

Clients stream, each over a connection of its own, in a process of their own that only counts bytes. Prints the tokens
per second of each turn and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from finetune.infer.request import Event, FinishedEvent, Request, Sampling
from tests.serve.serving import serving

PROMPT_TOKENS = 32


def prompt_of(client: int) -> list[int]:
    """Ids of ordinary tokens, others for each client."""
    return [1, *(1000 + (client * 97 + place * 31) % 20_000 for place in range(PROMPT_TOKENS - 1))]


def ask_directly(engine: Any, clients: int, tokens: int) -> float:
    """Seconds until all answers are there."""
    left, done = [clients], threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, FinishedEvent):
            left[0] -= 1
            if not left[0]:
                done.set()

    began = time.perf_counter()
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    for client in range(clients):
        engine.submit(Request(tuple(prompt_of(client)), sampling), listen)
    done.wait()
    return time.perf_counter() - began


def ask_over_http(port: int, clients: int, tokens: int) -> float:
    """The same, by another process."""
    command = [sys.executable, "-m", "tests.serve.overhead", "--client", str(port)]
    command += ["--clients", str(clients), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


async def stream_all(port: int, clients: int, tokens: int) -> dict[str, float]:
    """The client's process: seconds, and the bytes of all streams."""

    async def one(client: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        fields = {"prompt": prompt_of(client), "max_tokens": tokens, "temperature": 0, "stream": True}
        body = json.dumps({**fields, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += "connection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        data = await reader.read(-1)
        writer.close()
        assert b'"finish_reason": "length"' in data, data[-500:]
        return len(data)

    began = time.perf_counter()
    sizes = await asyncio.gather(*(one(client) for client in range(clients)))
    return {"seconds": time.perf_counter() - began, "bytes": sum(sizes)}


def random_engine(shape: str, settings: Any) -> Any:
    """An engine of a shape with random weights and the bundled tokenizer."""
    import tempfile
    from pathlib import Path

    from finetune.bench.workload import shape_path
    from finetune.infer.engine import Engine
    from finetune.infer.loading import ServedModels
    from finetune.moe.base_spec import BaseSpec
    from finetune.moe.load import load_base

    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_base(BaseSpec(shape_path(shape, Path(scratch))), random_weights_seed=0)
    return Engine(ServedModels(loaded, (), {"model": 0}), shape, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--client", type=int, metavar="PORT", help="Be the client's process.")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--random-weights", action="store_true", help="MODEL is only a shape.")
    asked = parser.parse_args()
    if asked.client is not None:
        print(json.dumps(asyncio.run(stream_all(asked.client, asked.clients, asked.tokens))))
        return
    from finetune.infer.engine import Engine
    from finetune.infer.residency import EngineSettings

    settings = EngineSettings(max_batch=asked.clients, max_length=4096 if asked.random_weights else None)
    made = (
        random_engine(asked.model, settings)
        if asked.random_weights
        else Engine.load(asked.model, device=asked.device, settings=settings)
    )
    with made as engine, serving(engine) as served:
        total = asked.clients * asked.tokens
        ask_directly(engine, asked.clients, asked.tokens)
        ask_over_http(served.port, asked.clients, asked.tokens)
        direct, http = [], []
        for turn in range(asked.turns):
            direct.append(total / ask_directly(engine, asked.clients, asked.tokens))
            http.append(total / ask_over_http(served.port, asked.clients, asked.tokens))
            print(f"turn {turn}: {direct[-1]:8.1f} tokens/s directly, {http[-1]:8.1f} over HTTP", flush=True)
        ratio = statistics.median(http) / statistics.median(direct)
        shown = {"bench": "server", "clients": asked.clients, "tokens": asked.tokens}
        print(json.dumps({**shown, "direct": direct, "http": http, "ratio": ratio}))


if __name__ == "__main__":
    main()
