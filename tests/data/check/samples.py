"""Made-up documents of the data check: a sound one, one with every fault, and examples that try to break out."""

from __future__ import annotations

import math
from typing import Any

EVERY_KIND = "tabs\tand  two spaces, an emoji 👩‍👩‍👧 and a flag 🇸🇨, שלום עולם, مرحبا بالعالم, 日本語のテキスト"
INJECTED = (
    "<script>document.title='x'</script><img src=x onerror=alert(1)>&lt;b&gt; {{ 7 * 7 }} [bold]rich[/bold] :smile:"
)
UNSEEN = (
    "\x1b[31mred\x1b[0m\x00 bell\x07 back\x08 carriage\r over\u202edesrever\u202c lone\ud800 bom\ufeff zero\u200bwidth"
)


def piece(text: str, *, supervised: bool = False, control: bool = False) -> dict[str, Any]:
    return {"text": text, "supervised": supervised, "control": control}


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    """Pieces as Mistral's v1 template makes them."""
    pieces = [piece("<s>", control=True)]
    for question, answer in turns:
        pieces += [piece(f" [INST] {question} [/INST]"), piece(f" {answer}", supervised=True)]
        pieces.append(piece("</s>", supervised=True, control=True))
    return pieces


def example(pieces: list[dict[str, Any]], *, part: str = "train", where: str = "train.jsonl line 3") -> dict[str, Any]:
    tokens = [max(1, len(each["text"]) // 4) for each in pieces]
    learnt = sum(number for number, each in zip(tokens, pieces, strict=True) if each["supervised"])
    return {"part": part, "where": where, "tokens": sum(tokens), "supervised": learnt, "pieces": pieces}


CODE = """Recursion is shortest:

```python
def depth(tree):
    return 1 + max(map(depth, tree), default=0)
```

The default ends it."""
SOUND_EXAMPLES = [
    example(
        chat(
            ("How deep is a nested list in Python?", CODE),
            ("And without recursion?", "Keep a stack of pairs of a list and its depth, and take the largest depth."),
        )
    ),
    example(
        chat(("Translate to Arabic: hello, world", "مرحبا بالعالم"), ("And to Hebrew?", "שלום, עולם 👋")),
        part="held-out",
        where="held_out.jsonl line 12",
    ),
]
HARD_EXAMPLES = [
    example(chat((EVERY_KIND, EVERY_KIND), (INJECTED, INJECTED), (UNSEEN, UNSEEN))),
    example(chat(("Is </s> or <s> or [INST] in what I typed a control token?", "No. " + "longword" * 80))),
    example(chat(("Write a long text.", "A line of it, of some length, that goes on.\n" * 60))),
    example([piece("nothing is learnt here")], part="held-out", where=f"{INJECTED} line 1"),
]


def histogram(rows: list[int], width: int) -> list[dict[str, int]]:
    return [{"from": i * width, "to": (i + 1) * width, "rows": number} for i, number in enumerate(rows)]


def source(where: str, form: str, rows: int, used: int, *, weight: float | None = None) -> dict[str, Any]:
    return {"where": where, "form": form, "weight": weight, "rows": rows, "used": used, "refused": rows - used}


def part(name: str, rows: int, **changed: Any) -> dict[str, Any]:
    used = changed.pop("used", rows)
    tokens = 411 * used
    made = {
        "name": name,
        "sources": [source(f"data/{name}.jsonl", "messages", rows, used)],
        "rows": rows,
        "used": used,
        "refused": [],
        "unseen": [],
        "duplicates": {"exact": 0, "near": None, "removed": 0},
        "held_out": 0,
        "too_long": {"policy": "truncate", "rows": 0, "dropped": 0, "truncated": 0, "split": 0, "tokens_lost": 0},
        "examples": used,
        "tokens": tokens,
        "supervised_tokens": tokens * 2 // 5,
        "supervised_share": (tokens * 2 // 5) / tokens if tokens else 0.0,
        "turns": 2 * used,
        "turns_with_end": 2 * used,
        "rows_unsupervised": 0,
        "lengths": {
            "longest": 3821,
            "median": 352,
            "histogram": histogram(
                [round(used * 0.21 * math.exp(-((i - 1.6) ** 2) / 9)) + 24 - i for i in range(24)], 160
            ),
        },
        "batches": {"kind": "packed", "rows": -(-tokens // 4055), "efficiency": 0.9914},
    }
    assert not set(changed) - set(made)
    return {**made, **changed}


def sound() -> dict[str, Any]:
    """A set without a fault."""
    return {
        "recipe": "recipes/mixtral-8x7b/qlora-attention-80gb.yaml",
        "model": "mistralai/Mixtral-8x7B-v0.1",
        "template": "mistral-v1",
        "loss_on": "all",
        "max_length": 4096,
        "packing": True,
        "parts": [part("train", 24880), part("held-out", 500)],
        "leakage": {"exact": 0, "near": None, "where": []},
        "schedule": {
            "epochs": 2.0,
            "steps": 1262,
            "tokens_per_epoch": 10330112,
            "tokens_per_second": 8524.0,
            "device": "NVIDIA H100 80GB HBM3",
            "device_is_here": False,
            "measured_rows": "4 x 4096 tokens",
            "hours": 0.673,
            "cost": 2.02,
        },
        "seconds": 12.31,
        "cached": False,
        "faults": [],
    }


def faulty() -> dict[str, Any]:
    """A set with every fault, and texts that try to be markup in every place that holds one."""
    reasons = [
        ("user and assistant do not take turns", 311),
        ("not JSON: a line ends within a string", 57),
        (f"unknown role '{INJECTED}'", 12),
        ("every assistant turn is empty", 1),
    ]
    where = [f"train.jsonl line {number}" for number in (3, 17, 18, 19, 40)]
    where += [f"{UNSEEN}.jsonl line 4", "b.jsonl line 9"]
    refused = [{"reason": reason, "rows": rows, "where": where[: min(rows, 7)]} for reason, rows in reasons]
    train = part(
        "train",
        2400,
        used=1964,
        refused=refused,
        sources=[
            source(f"data/{'deep/' * 30}train.jsonl", "sharegpt", 2000, 1700, weight=0.7),
            source(f"hub/{INJECTED}", "alpaca", 400, 319, weight=0.3),
        ],
        duplicates={"exact": 240, "near": 12, "removed": 0},
        too_long={"policy": "cut", "rows": 412, "dropped": 55, "truncated": 350, "split": 7, "tokens_lost": 91234},
        examples=1971,
        turns=4400,
        turns_with_end=4050,
        rows_unsupervised=43,
        lengths={"longest": 1024, "median": 700, "histogram": histogram([9, 30, 0, 210, 480, 390, 852], 150)},
        batches={"kind": "padded", "rows": 1971, "efficiency": 0.613},
    )
    held_out = part("held-out", 40, used=0, tokens=0, supervised_tokens=0, supervised_share=0.0, examples=0, turns=0)
    held_out |= {"turns_with_end": 0, "lengths": {"longest": 0, "median": 0, "histogram": []}}
    held_out["batches"] = {"kind": "padded", "rows": 0, "efficiency": 0.0}
    held_out["refused"] = [{"reason": "no assistant turn", "rows": 40, "where": ["held_out.jsonl line 1"]}]
    return {
        "recipe": f"my recipes/{INJECTED}.yaml",
        "model": "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "template": f"templates/{'my-' * 40}template.jinja",
        "loss_on": "completion",
        "max_length": 1024,
        "packing": False,
        "parts": [train, held_out],
        "leakage": {"exact": 31, "near": 4, "where": ["held_out.jsonl line 5", "held_out.jsonl line 6"]},
        "schedule": {
            "epochs": 0.4,
            "steps": 1,
            "tokens_per_epoch": 2018304,
            "tokens_per_second": None,
            "device": None,
            "device_is_here": None,
            "measured_rows": None,
            "hours": None,
            "cost": None,
        },
        "seconds": 0.4,
        "cached": True,
        "faults": [
            {"level": "error", "what": "train: 381 of 2,400 rows cannot be used", "fix": "correct them by `--fix DIR`"},
            {"level": "error", "what": f"held-out: {INJECTED}", "fix": f"{UNSEEN}"},
            {"level": "warning", "what": "train: 350 turns do not end", "fix": "set data.too_long: truncate"},
        ],
    }
