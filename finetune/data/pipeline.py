"""One source to encoded rows on the disk: read in chunks, parsed and tokenized in processes, kept for the next start.

Why: a set larger than memory must go through, two cores should both work, and a second start should not tokenize.
How: the reader's chunks go to a pool of processes; each gives back an Arrow batch, and they are written in order,
so the result does not depend on the number of processes. The folder's name is a fingerprint of all that the rows depend
on: the data, the tokenizer and its template, and the settings. It appears whole or not at all. Beside the tokens of a
row lie its counts, so that a report over any selection of rows reads no tokens.

Leaves out: duplicates, splits and mixtures, which select among rows that lie here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import tokenizers
from datasets import Dataset
from datasets.utils import tqdm

from finetune.data.duplicates import SIGNATURE_VERSION, content_key, signature
from finetune.data.encoding import ChatEncoder, Refused, encode_settings, encoder_of
from finetune.data.forms import Form, FormName, find_form, parse
from finetune.data.lengths import Fitter, Lengths, TooLong
from finetune.data.readers import Source, open_source
from finetune.data.reading import Reader, sample_row
from finetune.data.rows import IGNORED, Conversation, Encoded, LossOn, RawChunk, Unit
from finetune.errors import DataError
from finetune.runfolder import staged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 1  # of the files below; another one is not read
_ROWS, _LEDGER = "rows.arrow", "ledger.json"
_POSITIONS_KEPT = 8
_ABANDONED_SECONDS = 24 * 3600
_AHEAD = 2  # chunks a process has waiting
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("position", pa.int64()),
        ("key", pa.binary(16)),
        ("signature", pa.binary()),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("turns", pa.int32()),
        ("turns_with_end", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read.

    Args:
        columns, roles: our names to the data's, the data's to ours.
    """

    source: Source
    format: FormName | Literal["auto"] = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Teaching:
    """What becomes of a conversation: which turns are learnt, and what happens to one that is too long."""

    loss_on: LossOn = "all"
    max_length: int | None = None
    too_long: TooLong = "truncate"
    signatures: bool = False  # of near duplicates


@dataclass
class Refusals:
    """Rows that cannot be used, by reason: how many, and the first positions."""

    rows: int = 0
    positions: list[int] = field(default_factory=list)

    def add(self, positions: list[int]) -> None:
        self.rows += len(positions)
        self.positions += positions[: _POSITIONS_KEPT - len(self.positions)]


@dataclass
class Ledger:
    """What became of every row of a source: `rows` = `used` + the refused ones."""

    where: str
    unit: Unit
    form: str
    rows: int = 0
    refused: dict[str, Refusals] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)
    files: list[tuple[int, str, int]] = field(default_factory=list)  # first position, name and unit, positions before

    @property
    def used(self) -> int:
        return self.rows - sum(refusals.rows for refusals in self.refused.values())

    def at(self, position: int) -> str:
        """How a user finds a row: `train.jsonl line 3`."""
        _, name, before = self.files[bisect_right(self.files, position, key=lambda file: file[0]) - 1]
        return f"{name} {position - before}"

    def enter(self, reader: Reader, position: int) -> None:
        """Notes where rows from `position` on are found."""
        name, _, number = reader.locate(position).rpartition(" ")
        before = position - int(number)
        if not self.files or self.files[-1][1:] != (name, before):
            self.files.append((position, name, before))


@dataclass(frozen=True)
class EncodedSource:
    """Rows of one source, memory-mapped, and what became of those that it had.

    Columns: input_ids and labels (int32), position, key (16 bytes, equal for equal conversations), signature, and the
    counts tokens, supervised, turns, turns_with_end.
    """

    dataset: Dataset
    ledger: Ledger
    cached: bool


def cache_folder() -> Path:
    """Where tokenized rows are kept; any folder in it may be deleted."""
    named = os.environ.get("MOE_QLORA_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-qlora"


def encode_source(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    teaching: Teaching,
    *,
    processes: int = 1,
    name: str = "data",
) -> EncodedSource:
    """Reads, checks, tokenizes and masks a source, or takes the rows that an earlier call left.

    Args:
        tokenizer: with a chat template that `apply_template` has put on it or accepted.
        name: what the progress bar calls it.

    Raises:
        DataError: the source cannot be read, or the form of its rows is unknown.
    """
    reader = open_source(reading.source)
    folder = cache_folder() / "rows" / _fingerprint(reader, reading, tokenizer, teaching)
    cached = (folder / _LEDGER).is_file()
    if not cached:
        form = form_of(reader, reading)
        _sweep(folder.parent)
        with staged(folder, replace=True) as partial:
            ledger = _write(reader, form, tokenizer, teaching, partial / _ROWS, processes, name)
            (partial / _LEDGER).write_text(json.dumps(asdict(ledger)), encoding="utf-8")
    return EncodedSource(Dataset.from_file(str(folder / _ROWS)), _read_ledger(folder / _LEDGER), cached)


def _fingerprint(reader: Reader, reading: Reading, tokenizer: PreTrainedTokenizerBase, teaching: Teaching) -> str:
    versions = [_VERSION, SIGNATURE_VERSION, tokenizers.__version__]
    parts = [versions, reader.fingerprint(), asdict(reading), asdict(teaching), encode_settings(tokenizer)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sweep(folder: Path) -> None:
    """Removes what starts that were killed left behind, once nobody can be writing it any more."""
    for partial in folder.glob(".*.partial"):
        if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def form_of(reader: Reader, reading: Reading) -> Form:
    """The form of the first rows.

    Raises:
        DataError: no row can be read, or they have none.
    """
    sample = sample_row(reader)
    if not sample:
        raise DataError(
            "not one of the first rows can be read",
            where=reader.where,
            allowed="rows that are objects with named columns",
            fix="correct the file; `finetune data check` names the rows once some can be read",
        )
    return find_form(sample, reading.format, columns=reading.columns, roles=reading.roles, where=reader.where)


def _read_ledger(path: Path) -> Ledger:
    found = json.loads(path.read_text(encoding="utf-8"))
    found["refused"] = {reason: Refusals(**refusals) for reason, refusals in found["refused"].items()}
    found["lengths"] = Lengths(**found["lengths"])
    found["files"] = [tuple(file) for file in found["files"]]
    return Ledger(**found)


# ---- in this process: reading and writing ---------------------------------------------------------------------------


def _write(
    reader: Reader,
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    teaching: Teaching,
    path: Path,
    processes: int,
    name: str,
) -> Ledger:
    ledger = Ledger(reader.where, reader.unit, form.name)
    size, unit = reader.size()
    bar = tqdm(
        total=size or None,
        unit="B" if unit == "bytes" else " rows",
        unit_scale=True,
        desc=f"Tokenizing {name}",
        delay=1,
    )
    # Compressed, 40 million tokens would take half the space and three times the time.
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        done = 0
        for result, reached in _results(reader, _Worker(form, tokenizer, teaching), processes):
            writer.write_batch(result.batch)
            ledger.enter(reader, result.first)
            ledger.rows += result.rows
            ledger.lengths += result.lengths
            for reason, positions in result.refused.items():
                ledger.refused.setdefault(reason, Refusals()).add(positions)
            bar.update(reached - done)
            done = reached
    return ledger


def _results(reader: Reader, worker: _Worker, processes: int) -> Iterator[tuple[_Result, int]]:
    """The results of all chunks in order; other processes start when there is more than a chunk for each."""
    chunks = reader.chunks(0)
    first = [chunk for _, chunk in zip(range(processes + 1), chunks, strict=False)]
    if processes == 1 or len(first) <= processes:
        for chunk, reached in first:
            yield worker(chunk), reached
        for chunk, reached in chunks:
            yield worker(chunk), reached
        return
    # Forked, as `datasets` does it: the tokenizer and what is imported come along. CUDA is not used there.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(worker,)) as pool:
        waiting: deque[tuple[Future[_Result], int]] = deque()
        try:
            for chunk, reached in _both(first, chunks):
                waiting.append((pool.submit(_work, chunk), reached))
                if len(waiting) > _AHEAD * processes:
                    future, mark = waiting.popleft()
                    yield future.result(), mark
            while waiting:
                future, mark = waiting.popleft()
                yield future.result(), mark
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _both(first: list[tuple[RawChunk, int]], rest: Iterator[tuple[RawChunk, int]]) -> Iterator[tuple[RawChunk, int]]:
    yield from first
    yield from rest


# ---- in a worker: a chunk to an Arrow batch -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    batch: pa.RecordBatch
    first: int
    rows: int
    refused: dict[str, list[int]]
    lengths: Lengths


_worker: list[_Worker] = []  # of this process


def _start(worker: _Worker) -> None:
    _worker[:] = [worker]


def _work(chunk: RawChunk) -> _Result:
    return _worker[0](chunk)


@dataclass
class _Worker:
    form: Form
    tokenizer: PreTrainedTokenizerBase
    teaching: Teaching

    @cached_property
    def encoder(self) -> ChatEncoder:
        return encoder_of(self.tokenizer)

    def __call__(self, chunk: RawChunk) -> _Result:
        parsed = parse(chunk, self.form)
        refused: dict[str, list[int]] = {}
        for position, reason in parsed.refused:
            refused.setdefault(reason, []).append(position)
        conversations, positions, encoded = self._encode(parsed.conversations, parsed.positions, refused)
        fitter = Fitter(self._encode_fitting, self.teaching.max_length, self.teaching.too_long)
        fitted: list[tuple[Conversation, int, list[Encoded]]] = []
        for conversation, position, row in zip(conversations, positions, encoded, strict=True):
            try:
                [rows] = fitter.fit([conversation], [row])
            except Refused as refusal:  # a template that takes a conversation, but not the beginning of it
                refused.setdefault(str(refusal), []).append(position)
                continue
            fitted.append((conversation, position, rows))
        batch = self._batch(fitted)
        return _Result(batch, chunk.first, len(parsed.positions) + len(parsed.refused), refused, fitter.lengths)

    def _encode_fitting(self, conversations: list[Conversation]) -> list[Encoded]:
        return self.encoder.encode(conversations, loss_on=self.teaching.loss_on)

    def _encode(
        self, conversations: list[Conversation], positions: list[int], refused: dict[str, list[int]]
    ) -> tuple[list[Conversation], list[int], list[Encoded]]:
        """Without what the template does not take."""
        kept: tuple[list[Conversation], list[int], list[Encoded]] = ([], [], [])
        rows = self.encoder.encode_each(conversations, loss_on=self.teaching.loss_on)
        for conversation, position, row in zip(conversations, positions, rows, strict=True):
            if isinstance(row, Refused):
                refused.setdefault(str(row), []).append(position)
                continue
            kept[0].append(conversation)
            kept[1].append(position)
            kept[2].append(row)
        return kept

    def _batch(self, fitted: list[tuple[Conversation, int, list[Encoded]]]) -> pa.RecordBatch:
        """A chunk's rows; the key and the signature of a conversation stand at each of its rows."""
        flat, positions, keys, marks = [], [], [], []
        for conversation, position, rows in fitted:
            key = content_key(conversation) if rows else None
            mark = signature(conversation) if rows and self.teaching.signatures else None
            for row in rows:
                flat.append(row)
                positions.append(position)
                keys.append(key)
                marks.append(mark)
        lengths = np.array([len(row.ids) for row in flat], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.concatenate([row.ids for row in flat]) if flat else np.empty(0, np.int32)
        learnt = np.concatenate([row.supervised for row in flat]) if flat else np.empty(0, bool)
        supervised, turns, ended = _count(ids, learnt, lengths, offsets, self.tokenizer.eos_token_id)
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.array(np.where(learnt, ids, IGNORED).astype(np.int32))),
            pa.array(positions, pa.int64()),
            pa.array(keys, pa.binary(16)),
            pa.array(marks, pa.binary()),
            pa.array(lengths),
            *map(pa.array, (supervised, turns, ended)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _count(
    ids_N: np.ndarray, learnt_N: np.ndarray, lengths_R: np.ndarray, offsets: np.ndarray, eos: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row: supervised tokens, supervised turns, and those of them that end with the end of sequence; int32.

    A turn is a stretch of supervised tokens that ends where the next token is not learnt or belongs to another row, or
    with an end of sequence.
    """
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    last_N = np.zeros(len(ids_N), dtype=bool)
    last_N[offsets[1:][lengths_R > 0] - 1] = True
    goes_on_N = np.zeros(len(ids_N), dtype=bool)
    goes_on_N[:-1] = learnt_N[1:]
    is_eos_N = ids_N == eos
    ends_N = learnt_N & (last_N | ~goes_on_N | is_eos_N)
    counts = (learnt_N, ends_N, ends_N & is_eos_N)
    supervised, turns, ended = (np.bincount(row_N[mark], minlength=len(lengths_R)).astype(np.int32) for mark in counts)
    return supervised, turns, ended
