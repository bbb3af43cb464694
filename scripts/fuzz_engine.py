"""Odd and hostile requests to a running server, many at once, and then ordinary clients who must all be answered.

    finetune serve recipes/tiny-mixtral/model --port 8000 --max-length 256 --kv-gib 0.01 &
    scripts/fuzz_engine.py http://127.0.0.1:8000 --requests 2000 --clients 64

Requests are drawn by a seed: least and largest sampling values and some beyond, prompts of any token ids (halves of
characters, control tokens), no `max_tokens`, stop texts, log-probabilities, unknown models, bodies that are no JSON,
streams and clients that leave in the middle. Any response counts as an answer, and so does a client's own leaving; the
ordinary clients need 200 and a text. Exit status 1 if anybody was left unanswered, or if /health is not 200 at the end.

Leaves out: what the server is slow at (large bodies, half-sent headers), and whether answers are right.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx

TEMPERATURES = (0, 5e-324, 1e-46, 1e-40, 0.3, 1, 100, -1, 1e308, "hot", None)
TOP_PS = (1e-46, 5e-324, 0.5, 1, 1 - 2**-53, 0, 1.5, None)
TOP_KS = (0, 1, 5, 10**9, 10**400, -1, -2, None)
PENALTIES = (1, 0.01, 100, 1e-46, 0, -3, 1.2, None)
LENGTHS = (1, 2, 7, 20, 40, 0, 10**400, None)


def draw_body(draw: Random, models: list[str], vocab: int) -> dict[str, Any]:
    """One request's fields; most are valid one by one."""
    ids = [draw.randrange(vocab) for _ in range(draw.choice((1, 2, 9, 60)))]
    prompts: tuple[Any, ...] = ("Once upon a time", "🦜" * 5, "", ids, ids, [ids, ids[:1]], [vocab + 5], None, {"a": 1})
    body: dict[str, Any] = {"model": draw.choice(models), "prompt": draw.choice(prompts)}
    fields = {
        "temperature": TEMPERATURES,
        "top_p": TOP_PS,
        "top_k": TOP_KS,
        "min_p": (0, 0.5, 1 - 2**-53, 1, None),
        "repetition_penalty": PENALTIES,
        "max_tokens": LENGTHS,
        "seed": (0, 1, 2**63 - 1, -1, 2**70, None),
        "stop": ("\n", ["a", "�"], "", ["x"] * 20, None),
        "logprobs": (0, 3, 20, 21, None),
        "n": (1, 2, 0, None),
        "ignore_eos": (True, False),
        "grammar": ("root ::= x", None),
    }
    for name, values in fields.items():
        if draw.random() < 0.35:
            # Mostly values that are let through, so that the engine has something to do.
            body[name] = draw.choice(values[: 1 + len(values) // 2] if draw.random() < 0.7 else values)
    return body


def ask_oddly(client: httpx.Client, seed: int, models: list[str], vocab: int) -> str:
    """What became of one request: a status, or "left" where the client did."""
    draw = Random(seed)
    if draw.random() < 0.03:
        content = draw.choice((b"{", b"\xff", b"[]", b"", b"null"))
        return str(client.post("/v1/completions", content=content, headers=_JSON).status_code)
    body = draw_body(draw, models, vocab)
    if draw.random() < 0.6:
        return str(client.post("/v1/completions", json=body).status_code)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for _ in response.iter_lines():
            if draw.random() < 0.1:
                return "left"
    return str(response.status_code)


def ask_plainly(client: httpx.Client, number: int, model: str) -> str:
    body = {"model": model, "prompt": f"Once upon a time, {number}", "max_tokens": 8, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    return "answered" if response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 8 else "not"


def run(url: str, requests: int, clients: int, seed: int) -> dict[str, Any]:
    """Counts of what became of the odd requests and of the ordinary ones, and /health at the end.

    Args:
        url: of the server, without /v1; its first model answers the ordinary clients.
    """
    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(base_url=url, timeout=120, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]

        def odd(number: int) -> str:
            try:
                return ask_oddly(client, seed + number, [*names * 3, "nobody"], 32000)
            except httpx.HTTPError as error:
                return f"unanswered: {type(error).__name__}"

        def plain(number: int) -> str:
            try:
                return ask_plainly(client, number, names[0])
            except httpx.HTTPError as error:
                return f"unanswered: {type(error).__name__}"

        became = Counter(pool.map(odd, range(requests)))
        after = Counter(pool.map(plain, range(clients)))
        return {"odd": dict(became), "plain": dict(after), "health": client.get("/health").status_code}


def unanswered(found: dict[str, Any]) -> int:
    """Odd requests without any response, and ordinary ones without a whole answer."""
    odd = sum(count for name, count in found["odd"].items() if name.startswith("unanswered"))
    return odd + sum(count for name, count in found["plain"].items() if name != "answered")


_JSON = {"content-type": "application/json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = run(asked.url, asked.requests, asked.clients, asked.seed)
    print(found)
    print(f"unanswered: {unanswered(found)}")
    return int(unanswered(found) > 0 or found["health"] != 200)


if __name__ == "__main__":
    sys.exit(main())
