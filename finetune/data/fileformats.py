"""Readers of single files: JSON lines, JSON, Parquet, CSV, TSV and Arrow.

Why: what `datasets` says about a malformed line names neither the line nor the way out, and it writes every file
anew into its cache. How: each format is read here a block at a time, so memory stays small whatever the size; what is
wrong with one row (bad bytes, a line beyond 64 MiB, too many cells) becomes a `RowFault` in that row's place, and what
is wrong with the file as a whole is a `DataError`. Only a `.json` file that holds one list is loaded whole. JSON lines
leave here unparsed; a worker parses them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.reading import (
    ARROW_DAMAGE,
    BLOCK,
    BOM,
    CHUNK_ROWS,
    GZIP_DAMAGE,
    MAX_LINE,
    SAVE_AS_UTF8,
    Reader,
    SizeUnit,
    checked,
    digest,
    open_binary,
    read_lines,
    values_of,
)
from finetune.data.rows import RawChunk, RowFault
from finetune.errors import DataError

ONLY_SPLIT = "train"  # what a single file is, as `datasets` has it
_HASHED_WHOLE = 1 << 30  # larger files are recognized by size and time of change
_BAD_RECORD = RowFault(
    "bytes that cannot be read (bad UTF-8, a line beyond 64 MiB, or the end of a damaged file)", fix=SAVE_AS_UTF8
)
_QUOTES = (
    'write cells as a CSV library does: a text with a comma, a quote or a line end in double quotes, "" for a quote'
)
# What users name besides: suffix -> what to do about it.
_OTHER_FILES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (UTF-8), with columns question and answer"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), "unpack it, and name a file or folder of what was in it"),
    **dict.fromkeys((".yaml", ".yml"), "name data here; a recipe is what `finetune train` takes"),
    **dict.fromkeys(
        (".txt", ".md", ".pdf", ".docx", ".html"),
        "write questions and answers: a CSV with columns question and answer, or JSON lines; pretraining on plain text "
        "is not done here",
    ),
}


class FileReader(Reader):
    """What the readers of one file share: its size in bytes, and a digest of its content."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.path, self.where, self.name, self.unit = path, str(path), name, "row"
        self._bytes = path.stat().st_size

    def size(self) -> tuple[int, SizeUnit]:
        return self._bytes, "bytes"

    def fingerprint(self) -> str:
        kind = type(self).__name__ + suffix_of(self.path)
        if self._bytes > _HASHED_WHOLE:
            return digest(kind, str(self._bytes), str(self.path.stat().st_mtime_ns))
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return digest(kind, content.hexdigest())

    def splits(self) -> dict[str, FileReader]:
        """Readers of the splits that the file names; all of it is one where it names none."""
        return {ONLY_SPLIT: self}

    def _value_chunks(self, index: int, rows: Iterator[tuple[list[Any], int]]) -> Iterator[tuple[RawChunk, int]]:
        """Chunks of values, their positions running on; an empty list is no chunk."""
        first = 1
        for values, done in rows:
            if values:
                yield RawChunk(index, first, values=values), done
            first += len(values)


# ---- JSON -----------------------------------------------------------------------------------------------------------


class JsonLines(FileReader):
    """One JSON object a line, unparsed; also compressed by gzip."""

    def __init__(self, path: Path, *, name: str) -> None:
        super().__init__(path, name=name)
        self.unit = "line"

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        first = 1
        for lines, done in read_lines(self.path):
            for faulty, run in groupby(lines, key=lambda line: isinstance(line, RowFault)):
                items: list[Any] = list(run)
                for start in range(0, len(items), CHUNK_ROWS):
                    part = items[start : start + CHUNK_ROWS]
                    if faulty:
                        yield RawChunk(index, first, values=part), done
                    else:
                        yield RawChunk(index, first, lines=[b"" if line.isspace() else line for line in part]), done
                    first += len(part)


class JsonList(FileReader):
    """A JSON document that is a list of rows, or an object with lists of rows in it."""

    def __init__(self, path: Path, *, name: str, value: Any) -> None:
        super().__init__(path, name=name)
        self._rows = _rows_in(value)
        self._lists = _lists_in(value) if isinstance(value, dict) else {}

    def splits(self) -> dict[str, FileReader]:
        if len(self._lists) < 2:
            return super().splits()
        named = self._lists.items()
        return {split: JsonList(self.path, name=f"{self.name}, {split},", value=rows) for split, rows in named}

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        count = len(self._rows)
        starts = range(0, count, CHUNK_ROWS)
        parts = ((start, self._rows[start : start + CHUNK_ROWS]) for start in starts)
        return self._value_chunks(index, ((part, (start + len(part)) * self._bytes // count) for start, part in parts))

    def count(self) -> int:
        return len(self._rows)


def _open_json(path: Path, *, name: str) -> FileReader:
    """A list, an object with one list, or JSON lines under another name."""
    value = _whole_json(path)
    return JsonLines(path, name=name) if value is None else JsonList(path, name=name, value=value)


def _whole_json(path: Path) -> Any:
    """The value of the whole file, or None where it is JSON lines."""
    with open_binary(path) as file:
        try:
            beginning = file.read(MAX_LINE).removeprefix(BOM).lstrip()
        except GZIP_DAMAGE as fault:
            raise _not("gzip", path, fault) from fault
    line, _, rest = beginning.partition(b"\n")
    if not beginning.startswith(b"[") and _is_json(line) and rest.strip():
        return None
    try:
        with open_binary(path) as file:
            return json.loads(file.read().removeprefix(BOM).decode("utf-8"))
    except GZIP_DAMAGE as fault:
        raise _not("gzip", path, fault) from fault
    except (ValueError, RecursionError) as fault:
        raise DataError(
            f"the file is not valid JSON: {fault}",
            where=str(path),
            fix="correct the file, or name it .jsonl if it holds one object a line",
        ) from fault


def _rows_in(value: Any) -> list[Any]:
    """The rows of a whole JSON document; an object that is a conversation itself is one row."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = list(_lists_in(value).values())
        if len(lists) == 1:
            return lists[0]
    return [value]


def _lists_in(value: dict[str, Any]) -> dict[str, list[Any]]:
    """The lists of rows in an object; a list of turns is none."""
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    return {key: rows for key, rows in lists.items() if not {"role", "from"} & rows[0].keys()}


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ---- tables ---------------------------------------------------------------------------------------------------------


class Parquet(FileReader):
    """Parquet, page by page."""

    def __init__(self, path: Path, *, name: str) -> None:
        super().__init__(path, name=name)
        self._count = self._open().metadata.num_rows

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=BLOCK)
        except ARROW_DAMAGE as fault:
            raise _not("Parquet", self.path, fault) from fault

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        return self._value_chunks(index, self._rows())

    def _rows(self) -> Iterator[tuple[list[Any], int]]:
        read = 0
        try:
            for batch in self._open().iter_batches(CHUNK_ROWS):
                read += batch.num_rows
                yield values_of(batch), read * self._bytes // max(self._count, 1)
        except ARROW_DAMAGE as fault:
            raise _damaged(self.path, read, fault) from fault

    def count(self) -> int:
        return self._count


class Arrow(FileReader):
    """An Arrow stream, as `datasets` writes, or an Arrow file."""

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        return self._value_chunks(index, self._rows())

    def _rows(self) -> Iterator[tuple[list[Any], int]]:
        read = 0
        try:
            for batch, done in self._batches():
                for start in range(0, batch.num_rows, CHUNK_ROWS):
                    part = batch.slice(start, CHUNK_ROWS)
                    read += part.num_rows
                    yield values_of(part), done
        except ARROW_DAMAGE as fault:
            if read == 0:
                raise _not("Arrow", self.path, fault) from fault
            raise _damaged(self.path, read, fault) from fault

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        with pa.OSFile(str(self.path), "rb") as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                for number in range(file.num_record_batches):
                    yield (
                        checked(file.get_batch(number), self._bytes),
                        (number + 1) * self._bytes // file.num_record_batches,
                    )
                return
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                yield checked(batch, self._bytes), source.tell()


class Csv(FileReader):
    """Separated cells under a header; every cell is a string. Positions count records, not lines."""

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        return self._value_chunks(index, self._rows())

    def _rows(self) -> Iterator[tuple[list[Any], int]]:
        csv.field_size_limit(MAX_LINE)  # one limit for the process, of 128 KiB unless it is raised
        done = 0

        def lines() -> Iterator[str]:
            nonlocal done
            for block, done in read_lines(self.path):  # noqa: B007
                for line in block:
                    # A line that is not there stands as a lone surrogate, which no UTF-8 text can hold.
                    yield "\udcff" if isinstance(line, RowFault) else line.decode("utf-8", "surrogateescape") + "\n"

        records = csv.reader(lines(), delimiter=self._delimiter(), strict=True)
        header = self._header(records)
        values: list[Any] = []
        while True:
            try:
                cells = next(records)
            except StopIteration:
                break
            except csv.Error as fault:
                values.append(RowFault(f"not CSV: {fault}", fix=_QUOTES))
                continue
            if cells:
                values.append(_record(header, cells))
            if len(values) == CHUNK_ROWS:
                yield values, done
                values = []
        yield values, self._bytes

    def _delimiter(self) -> str:
        """Tab in .tsv; else a comma, or where the header has none the semicolon of European spreadsheets, or a tab."""
        if suffix_of(self.path).startswith(".tsv"):
            return "\t"
        try:
            with open_binary(self.path) as file:
                header = file.readline(BLOCK).decode("utf-8", "replace")
        except GZIP_DAMAGE:
            return ","  # reading on says what is wrong
        return next((mark for mark in (",", ";", "\t") if mark in header), ",")

    def _header(self, records: Iterator[list[str]]) -> list[str]:
        try:
            header = next(records, [])
        except csv.Error as fault:
            raise _not("CSV", self.path, fault) from fault
        if any(_is_broken(name) for name in header):
            raise _not("CSV", self.path, RowFault("the header is not UTF-8"))
        if len(set(header)) < len(header):
            raise _not("CSV", self.path, RowFault("the header names a column twice"))
        return header


def _record(header: list[str], cells: list[str]) -> dict[str, str] | RowFault:
    if any(_is_broken(cell) for cell in cells):
        return _BAD_RECORD
    if len(cells) != len(header):
        reason = f"more or fewer cells than the header's {len(header)}; a text with commas in it goes in double quotes"
        return RowFault(reason, fix=_QUOTES)
    return dict(zip(header, cells, strict=True))


def _is_broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


# ---- faults, and which file is read how ------------------------------------------------------------------------------


def _not(kind: str, path: Path, fault: Exception) -> DataError:
    reason = " ".join(str(fault).split())
    return DataError(f"the file is not {kind}: {reason}", where=str(path), fix="fetch or write it again")


def _damaged(path: Path, rows: int, fault: Exception) -> DataError:
    reason = " ".join(str(fault).split())
    return DataError(f"the file is damaged after row {rows}: {reason}", where=str(path), fix="fetch or write it again")


OPENERS: dict[str, Callable[..., FileReader]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _open_json,
    ".parquet": Parquet,
    ".csv": Csv,
    ".tsv": Csv,
    ".arrow": Arrow,
}
_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # which may be compressed
SUFFIXES = (*OPENERS, *(suffix + ".gz" for suffix in _TEXTS))


def suffix_of(path: Path) -> str:
    """The suffix that decides the format, `.gz` included."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def open_file(path: Path, *, name: str) -> FileReader:
    """The reader for a file.

    Raises:
        DataError: its suffix is unknown, or it is not what its name says.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"a data file that ends in {suffix or 'nothing'!r} is not read",
            where=str(path),
            allowed=", ".join(SUFFIXES),
            fix=_OTHER_FILES.get(suffix, "convert it to JSON lines, one {messages: [...]} a line"),
        )
    _require_data(path, suffix)
    return OPENERS[suffix.removesuffix(".gz")](path, name=name)


def _require_data(path: Path, suffix: str) -> None:
    """Refuses what stands in for the data, or is written in another way as a whole."""
    with path.open("rb") as file:
        beginning = file.read(BLOCK)
    if beginning.startswith(b"version https://git-lfs"):
        raise DataError(
            "the file is a pointer of git-lfs, and the data are not here",
            where=str(path),
            fix="fetch them: `git lfs pull` in the repository, or `hf download ID --repo-type dataset`",
        )
    utf16 = beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in (beginning[:1], beginning[1:2])
    if utf16 and suffix in _TEXTS:
        raise DataError(
            "the file is UTF-16, as PowerShell's `>` writes it, and not UTF-8",
            where=str(path),
            fix="save it as UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > NEW`",
        )
    line, _, rest = beginning.removeprefix(BOM).lstrip().partition(b"\n")
    if suffix in (".jsonl", ".ndjson") and line.startswith(b"[") and rest.strip() and not _is_json(line):
        raise DataError(
            "the file is one JSON list over several lines, not one object a line",
            where=str(path),
            fix=f"name it {path.stem}.json, or write one object a line: `jq -c '.[]' FILE > NEW.jsonl`",
        )
