"""From a file, a folder or a hub id to one column of checked conversations.

Why: what `datasets` says about a malformed line or a mixed column names neither the line nor the way out. How: local
JSON lines, JSON, Parquet and CSV are read here row by row, so that every fault carries its line or row; folders and hub
ids go through `datasets.load_dataset`. All rows are checked before any is used, and all faults come in one `DataError`.
The result is an Arrow table in memory. Leaves out streaming, mixing of several sources and removal of duplicates.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, ReadInstruction, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from finetune.data.messages import FaultLog, Form, Message, RowFault, find_form, to_messages
from finetune.errors import DataError

_SCHEMA = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
_CHUNK = 2000  # rows turned into Arrow at a time, so that Python objects do not pile up
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ONLY_SPLIT = "train"  # what a single file is, as `datasets` has it


@dataclass(frozen=True)
class _Row:
    """A row and its 1-based position; `fault` says why there is no `value`."""

    position: int
    value: Any = None
    fault: str | None = None


@dataclass(frozen=True)
class _Rows:
    """Rows in order, what a position counts, and how to name their origin in a message."""

    rows: Iterator[_Row]
    unit: Literal["line", "row"]
    where: str


def load_conversations(
    source: str | Path,
    *,
    split: str = "train",
    format: Literal["auto", "messages", "chatml_text"] = "auto",
    max_rows: int | None = None,
) -> Dataset:
    """Loads conversations into a data set with the one column `messages`, a list of {role, content}.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder that `datasets.load_dataset` reads, or a hub id.
        split: name of a split, or a slice of one as in `train[:1000]`; a single file is one split, `train`.
        format: how a row holds its conversation; `auto` looks at the first row.
        max_rows: use only the first so many rows of the split.

    Raises:
        DataError: the source or the split is not there, cannot be read or is empty, or rows cannot be trained on.
    """
    path = Path(source).expanduser()
    if path.is_file():
        # A slice counts rows of the whole file, so only a plain split may stop reading early.
        rows = _read_file(path)
        conversations = _collect(rows, format, max_rows if split == _ONLY_SPLIT else None)
        conversations = _slice(conversations, split, where=rows.where)
    elif path.is_dir():
        conversations = _collect(_read_with_datasets(str(path), split), format, max_rows)
    elif _is_hub_id(str(source)):
        conversations = _collect(_read_with_datasets(str(source), split), format, max_rows)
    else:
        raise _missing(path)
    return conversations if max_rows is None else conversations.select(range(min(max_rows, len(conversations))))


# ---- where rows come from -------------------------------------------------------------------------------------------


def _read_file(path: Path) -> _Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"a data file that ends in {path.suffix or 'nothing'!r} is not read",
            where=str(path),
            allowed=", ".join(_READERS),
            fix="convert it to JSON lines, one {messages: [...]} a line",
        )
    if path.stat().st_size == 0:
        raise DataError("the data file is empty", where=str(path), fix="name a file that holds conversations")
    return reader(path)


def _read_json(path: Path) -> _Rows:
    """A JSON list of objects, or JSON lines under another name."""
    with path.open("rb") as file:
        beginning = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        return _read_json_lines(path)
    try:
        values = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise DataError(f"the file is not valid JSON: {fault}", where=str(path), fix="correct the file") from fault
    return _Rows((_object_row(i, value) for i, value in enumerate(values, start=1)), "row", str(path))


def _read_json_lines(path: Path) -> _Rows:
    def rows() -> Iterator[_Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield _object_row(number, json.loads(line.rstrip().decode("utf-8")))
                except json.JSONDecodeError as fault:
                    yield _Row(number, fault=f"not valid JSON: {fault.msg} at column {fault.colno}")
                except UnicodeDecodeError as fault:
                    yield _Row(number, fault=f"not UTF-8 at byte {fault.start + 1}")
                except RecursionError:
                    yield _Row(number, fault="nested too deeply")

    return _Rows(rows(), "line", str(path))


def _object_row(position: int, value: Any) -> _Row:
    if isinstance(value, dict):
        return _Row(position, value)
    return _Row(position, fault="valid JSON, but not an object")


def _read_parquet(path: Path) -> _Rows:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as fault:
        raise DataError(f"the file is not Parquet: {fault}", where=str(path), fix="fetch or write it again") from fault

    def rows() -> Iterator[_Row]:
        values = (value for batch in file.iter_batches(_CHUNK) for value in batch.to_pylist())
        for position, value in enumerate(values, start=1):
            yield _Row(position, value)

    return _Rows(rows(), "row", str(path))


def _read_csv(path: Path) -> _Rows:
    def rows() -> Iterator[_Row]:
        try:
            with pd.read_csv(path, dtype=str, na_filter=False, chunksize=_CHUNK) as chunks:
                values = (value for chunk in chunks for value in chunk.to_dict("records"))
                for position, value in enumerate(values, start=1):
                    yield _Row(position, value)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as fault:
            raise DataError(f"the file is not CSV: {fault}", where=str(path), fix="correct the file") from fault

    return _Rows(rows(), "row", str(path))


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_with_datasets(source: str, split: str) -> _Rows:
    """Rows of a folder or of a data set of the hub."""
    try:
        data = load_dataset(source, split=split)
    except DatasetNotFoundError as fault:
        raise DataError(
            f"the hub has no data set {source!r} that you may read",
            where=source,
            fix="check the name; for a gated or private data set run `hf auth login` first",
        ) from fault
    except ConnectionError as fault:
        raise DataError(
            f"{source!r} is neither a local file or folder nor a data set that the hub could be asked for: {fault}",
            where=source,
            fix="check the path, or connect to the network; a data set fetched once is read from the cache",
        ) from fault
    except ValueError as fault:
        if "split" not in str(fault):
            raise _unreadable(source, fault) from fault
        raise _unknown_split(split, get_dataset_split_names(source), where=source) from fault
    except (DatasetGenerationError, FileNotFoundError) as fault:
        raise _unreadable(source, fault) from fault
    return _Rows((_Row(i, row) for i, row in enumerate(data, start=1)), "row", f"{source}, split {split}")


# ---- rows to a data set ---------------------------------------------------------------------------------------------


def _collect(source: _Rows, format: Literal["auto", "messages", "chatml_text"], limit: int | None) -> Dataset:
    """Checks every row and gathers the conversations; raises if a single one is faulty, or if there is none."""
    log, form = FaultLog(source.unit), None
    tables: list[pa.Table] = []
    pending: list[list[Message]] = []
    count = 0
    for row in islice(source.rows, limit):
        count += 1
        if row.fault is None and form is None:
            form = find_form(row.value, format, where=source.where)
        fault = row.fault or _append(pending, row.value, form)
        if fault is not None:
            log.add(row.position, fault)
        if len(pending) == _CHUNK:
            tables.append(pa.Table.from_pydict({"messages": pending}, _SCHEMA))
            pending = []
    log.raise_if_any(rows=count, where=source.where)
    if count == 0:
        raise DataError("the data set holds no rows", where=source.where, fix="name a source that holds conversations")
    tables.append(pa.Table.from_pydict({"messages": pending}, _SCHEMA))
    return Dataset(pa.concat_tables(tables))


def _append(conversations: list[list[Message]], value: Any, form: Form | None) -> str | None:
    """Adds the row's conversation, or says why it cannot be used."""
    assert form is not None
    try:
        conversations.append(to_messages(value, form))
    except RowFault as fault:
        return str(fault)
    return None


def _slice(conversations: Dataset, split: str, *, where: str) -> Dataset:
    """The part of a single file's rows that a split names, by the rules of `datasets`."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({_ONLY_SPLIT: len(conversations)})
    except ValueError as fault:
        raise _unknown_split(split, [_ONLY_SPLIT], where=where) from fault
    chosen = [i for part in parts for i in range(part.from_, part.to)]
    if not chosen:
        raise DataError(f"split {split!r} holds no rows", where=where, fix="name a split that holds conversations")
    return conversations.select(chosen)


# ---- faults of the source itself ------------------------------------------------------------------------------------


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and Path(source).suffix.lower() not in _READERS and source[0] != "."


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"there is no folder {str(folder)!r}", where=str(path), fix="check the path in the recipe")
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _READERS or file.is_dir())
    near = difflib.get_close_matches(path.name, files, n=3) or files[:5]
    return DataError(
        f"there is no data file {path.name!r} in {str(folder)!r}",
        where=str(path),
        allowed=f"what is there: {', '.join(near)}" if near else None,
        fix="check the path in the recipe; one that starts with ./ is relative to the recipe's folder",
    )


def _unknown_split(split: str, known: list[str], *, where: str) -> DataError:
    return DataError(
        f"there is no split {split!r}",
        where=where,
        allowed=", ".join(known) + ", or a slice of one as in train[:1000]",
        fix="name one of these in data.train_split or data.eval_split",
    )


def _unreadable(source: str, fault: Exception) -> DataError:
    reason = fault.__cause__ or fault
    return DataError(
        f"the data set cannot be read: {' '.join(str(reason).split())}",
        where=source,
        fix="name a single file of it to see the line or row at fault",
    )
