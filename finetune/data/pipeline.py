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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import tokenizers
from datasets import Dataset
from datasets.utils import tqdm

from finetune.checkpoint import read_json
from finetune.data.encoding import encode_settings
from finetune.data.reading import ARROW_DAMAGE, Reader, first_row, sample_row
from finetune.data.recognition import find_form
from finetune.data.rows import RawChunk, RowFault, Unit
from finetune.data.selection import SIGNATURE_VERSION
from finetune.data.sources import Source, open_source
from finetune.data.turns import Form, FormName
from finetune.data.worker import SCHEMA, ChunkRows, Lengths, Supervision, Worker
from finetune.disk import staged
from finetune.errors import DataError
from finetune.values import check_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 3  # of the files below; another one is not read
_ROWS, _LEDGER = "rows.arrow", "ledger.json"
_POSITIONS_KEPT = 8
_MOST_NAMES = 1000  # of reasons and keys that are told apart; rows may be keyed by ids
_OTHERS = "and others"
_ABANDONED_SECONDS = 24 * 3600
_AHEAD = 2  # chunks a process has waiting


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


@dataclass
class Places:
    """Rows that have something in common: how many, and the first positions."""

    rows: int = 0
    positions: list[int] = field(default_factory=list)

    def add(self, positions: list[int]) -> None:
        self.rows += len(positions)
        self.positions += positions[: _POSITIONS_KEPT - len(self.positions)]


@dataclass
class Ledger:
    """What became of every row of a source: `rows` = `used` + the refused ones.

    `refused` is by reason; `unseen` by the name of what used rows hold and the model never sees (`forms.py`).
    """

    where: str
    unit: Unit
    form: str
    rows: int = 0
    refused: dict[str, Places] = field(default_factory=dict)
    unseen: dict[str, Places] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)
    files: list[tuple[int, str, int]] = field(default_factory=list)  # first position, name and unit, positions before

    @property
    def used(self) -> int:
        return self.rows - sum(places.rows for places in self.refused.values())

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
    supervision: Supervision,
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
    folder = cache_folder() / "rows" / _fingerprint(reader, reading, tokenizer, supervision)
    kept = _kept(folder)
    cached = kept is not None
    if kept is None:
        form = form_of(reader, reading)
        _sweep(folder.parent)
        try:
            with staged(folder, replace=True) as partial:
                ledger = _write(reader, form, tokenizer, supervision, partial / _ROWS, processes, name)
                (partial / _LEDGER).write_text(json.dumps(asdict(ledger)), encoding="utf-8")
                if (folder / _LEDGER).is_file():
                    raise FileExistsError(folder)  # not replaced: the process that put it there may be reading it
        except OSError:
            # Another process, of this launch or another, may have put the same rows there meanwhile.
            if not (folder / _LEDGER).is_file():
                raise
        kept = _opened(folder)
    return EncodedSource(*kept, cached)


def _fingerprint(reader: Reader, reading: Reading, tokenizer: PreTrainedTokenizerBase, supervision: Supervision) -> str:
    versions = [_VERSION, SIGNATURE_VERSION, tokenizers.__version__]
    parts = [versions, reader.fingerprint(), asdict(reading), asdict(supervision), encode_settings(tokenizer)]
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
        raise _unreadable(reader)
    return find_form(sample, reading.format, columns=reading.columns, roles=reading.roles, where=reader.where)


def _unreadable(reader: Reader) -> DataError:
    """Why the first row cannot be read, which is why none can."""
    position, row = first_row(reader)
    fault = row if isinstance(row, RowFault) else RowFault("an object without a column")
    return DataError(
        f"not one of the first rows can be read; {reader.locate(position)}: {fault}",
        where=reader.where,
        allowed="rows that are objects with named columns",
        fix=fault.fix or "correct the file",
    )


def _kept(folder: Path) -> tuple[Dataset, Ledger] | None:
    """What an earlier call left; None, and the rows will be made again, where there is nothing or it is damaged."""
    if not (folder / _LEDGER).is_file():
        return None
    try:
        return _opened(folder)
    except ARROW_DAMAGE:  # a DataError is a ValueError
        (folder / _LEDGER).unlink(missing_ok=True)
        return None


def _opened(folder: Path) -> tuple[Dataset, Ledger]:
    """Rows and their ledger; raises `ARROW_DAMAGE`, of which `DataError` is one."""
    content = read_json(folder / _LEDGER, kind=DataError)
    fix = "delete that folder: the rows are made again"
    ledger = check_object(content, Ledger, kind=DataError, name=_LEDGER, where=str(folder / _LEDGER), fix=fix)
    return Dataset.from_file(str(folder / _ROWS)), ledger


# ---- in this process: reading and writing ---------------------------------------------------------------------------


def _write(
    reader: Reader,
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    supervision: Supervision,
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
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        done = 0
        for result, reached in _results(reader, Worker(form, tokenizer, supervision), processes):
            writer.write_batch(result.batch)
            ledger.enter(reader, result.first)
            ledger.rows += result.rows
            ledger.lengths += result.lengths
            for counted, found in ((ledger.refused, result.refused), (ledger.unseen, result.unseen)):
                for name_of, positions in found.items():
                    if name_of in counted or len(counted) < _MOST_NAMES:
                        counted.setdefault(name_of, Places()).add(positions)
                    else:
                        counted.setdefault(_OTHERS, Places()).add(positions)
            bar.update(reached - done)
            done = reached
    return ledger


def _results(reader: Reader, worker: Worker, processes: int) -> Iterator[tuple[ChunkRows, int]]:
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
        waiting: deque[tuple[Future[ChunkRows], int]] = deque()
        try:
            for chunk, reached in chain(first, chunks):
                waiting.append((pool.submit(_work, chunk), reached))
                if len(waiting) > _AHEAD * processes:
                    future, mark = waiting.popleft()
                    yield future.result(), mark
            while waiting:
                future, mark = waiting.popleft()
                yield future.result(), mark
        except BrokenProcessPool as killed:
            raise DataError(
                "a process that tokenizes was killed, most likely because memory ran out",
                where=reader.where,
                fix=f"set training.dataset_num_proc below {processes}; 1 tokenizes in this process",
            ) from killed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---- in another process ----------------------------------------------------------------------------------------------

_worker: list[Worker] = []  # of this process


def _start(worker: Worker) -> None:
    _worker[:] = [worker]


def _work(chunk: RawChunk) -> ChunkRows:
    return _worker[0](chunk)
