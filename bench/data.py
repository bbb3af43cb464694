"""`python -m bench data`: conversations to packed training rows, beside bare tokenization of the same text.

Two paths over one file of conversations that the bundled ones make by joining: `datasets.map` that only tokenizes text
which already lies in Arrow, with the same tokenizer and number of processes; and ours, from the JSON lines on: parsed,
checked, rendered, tokenized, masked, fingerprinted for duplicates, written and packed. Memory is what all processes of
this bench hold, shared pages counted once (PSS), sampled while a path runs.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.bench.result import conditions, rounded
from finetune.bench.workload import BUNDLED
from finetune.console import Report, gib
from finetune.data.batching import pack, packing_efficiency, row_lengths
from finetune.data.chat import apply_template
from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.moe.load import load_tokenizer

_CHARACTERS = 900  # of a conversation at least; about 400 tokens
_SAMPLE_SECONDS = 0.2
_COPIES = 20


def bench_data(report: Report, *, rows: int, processes: int, max_length: int, source: Path | None) -> dict[str, Any]:
    """Measures both paths.

    Args:
        rows: conversations to make.
        source: a file of conversations instead; then only our path is measured, without packing.
    """
    tokenizer = load_tokenizer(str(BUNDLED / "model"))
    apply_template(tokenizer, "mistral-v1")
    with tempfile.TemporaryDirectory(prefix="moe-qlora-bench-") as scratch:
        os.environ["MOE_QLORA_CACHE"] = str(Path(scratch) / "cache")
        file, bare = source, None
        if file is None:
            file = Path(scratch) / "conversations.jsonl"
            write_conversations(file, rows)
            bare = _timed(lambda: _tokenize_only(file, tokenizer, processes, Path(scratch)))
        ours = _timed(lambda: _ours(file, tokenizer, processes, max_length, packs=source is None))
    document: dict[str, Any] = {
        "bench": "data",
        "processes": processes,
        "max_length": max_length,
        "file_bytes": ours["file_bytes"],
        "rows": ours["rows"],
        "tokens": ours["tokens"],
        "bare": bare and {"seconds": rounded(bare["seconds"]), "peak_bytes": bare["peak_bytes"]},
        "ours": {name: rounded(ours[name]) for name in ("seconds", "encode_seconds", "pack_seconds")}
        | {"peak_bytes": ours["peak_bytes"]},
        "over_bare": bare and rounded(ours["seconds"] / bare["seconds"]),
        "packing_efficiency": rounded(ours["efficiency"]),
        "bundled_packing_efficiency": rounded(_bundled_efficiency(tokenizer, max_length)),
        **conditions(torch.device("cpu")),
    }
    _show(document, report)
    return document


def write_conversations(path: Path, rows: int) -> None:
    """`rows` conversations of about 400 tokens, made of bundled exchanges, numbered so that no two are equal."""
    turns = _exchanges()
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            messages: list[dict[str, str]] = []
            while sum(len(message["content"]) for message in messages) < _CHARACTERS:
                messages += next(turns)
            messages[0] = {**messages[0], "content": f"{number}. {messages[0]['content']}"}
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _exchanges() -> Iterator[list[dict[str, str]]]:
    with (BUNDLED / "data" / "train.jsonl").open(encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    while True:
        for messages in conversations:
            yield [message for message in messages if message["role"] != "system"]


def _tokenize_only(
    file: Path, tokenizer: PreTrainedTokenizerBase, processes: int, scratch: Path
) -> tuple[float, dict[str, Any]]:
    """Seconds of `datasets.map` alone; reading the file and joining the texts come before."""

    def texts() -> Iterator[dict[str, str]]:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield {"text": " ".join(message["content"] for message in json.loads(line)["messages"])}

    made: Any = Dataset.from_generator(texts, cache_dir=str(scratch / "texts"))
    begun = time.perf_counter()
    made.map(
        lambda batch: tokenizer(batch["text"], add_special_tokens=False),
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=["text"],
    )
    return time.perf_counter() - begun, {}


def _ours(
    file: Path, tokenizer: PreTrainedTokenizerBase, processes: int, max_length: int, *, packs: bool
) -> tuple[float, dict[str, Any]]:
    begun = time.perf_counter()
    source = encode_source(
        Reading(Source(str(file))), tokenizer, Supervision(max_length=max_length), processes=processes, name=file.name
    )
    encoded = time.perf_counter()
    tokens = sum(chunk.to_numpy().sum() for chunk in source.dataset.data.column("tokens").chunks)
    efficiency = None
    if packs:
        packed = pack(source.dataset.select_columns(["input_ids", "labels"]), max_length)
        efficiency = float(tokens / (len(packed) * max_length))
    done = time.perf_counter()
    return done - begun, {
        "encode_seconds": encoded - begun,
        "pack_seconds": done - encoded,
        "rows": len(source.dataset),
        "tokens": int(tokens),
        "efficiency": efficiency,
        "file_bytes": file.stat().st_size,
    }


def _bundled_efficiency(tokenizer: PreTrainedTokenizerBase, max_length: int) -> float:
    """Share of real tokens where 20 times the bundled rows are packed: their mix of lengths in a set of usual size."""
    rows = encode_source(Reading(Source(str(BUNDLED / "data" / "train.jsonl"))), tokenizer, Supervision()).dataset
    return packing_efficiency(np.tile(row_lengths(rows), _COPIES), max_length)


def _timed(work: Callable[[], tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """What `work` gives, its seconds, and the most memory that this process and its children held meanwhile."""
    stop, peak = threading.Event(), [0]

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], _held())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        seconds, found = work()
    finally:
        stop.set()
        sampler.join()
    return found | {"seconds": seconds, "peak_bytes": peak[0]}


def _held() -> int:
    """Bytes, shared pages counted once."""
    this = psutil.Process()
    held = 0
    for process in (this, *this.children(recursive=True)):
        try:
            held += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return held


def _show(document: dict[str, Any], report: Report) -> None:
    rows = []
    if document["bare"]:
        rows.append(("datasets.map, tokenization only", f"{document['bare']['seconds']:.1f}", "1.00"))
    over = "" if document["over_bare"] is None else f"{document['over_bare']:.2f}"
    rows.append(("conversations to packed rows", f"{document['ours']['seconds']:.1f}", over))
    size = f"{document['rows']:,} rows, {document['tokens'] / 1e6:.1f} M tokens, {document['processes']} processes"
    report.table(f"Data: {size}", ("path", "seconds", "times bare"), rows)
    report.line(f"peak memory: {gib(document['ours']['peak_bytes'])}")
    if document["packing_efficiency"] is not None:
        report.line(f"packing at {document['max_length']}: {document['packing_efficiency']:.2%} real tokens")
    mix = document["bundled_packing_efficiency"]
    report.line(f"packing the bundled lengths, {_COPIES} times, at {document['max_length']}: {mix:.2%} real tokens")
