"""What a reader is: a source of rows that comes in small chunks, is counted, sliced, joined and fingerprinted.

Why: rows are worked on by other processes and may be more than fit in memory, so the process that reads must neither
parse nor keep them. How: a `Reader` yields `RawChunk`s, and `rows_of` turns one into values in the worker. `Sliced` and
`Joined` make readers out of readers, so `split`, `max_rows` and folders are the same for every kind of file. Lines are
read in blocks of a MiB, and Arrow batches are checked in full, since one damaged offset would end the process.
Leaves out the file formats (fileformats.py) and where a source is found (sources.py).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from finetune.data.rows import RawChunk, RowFault, Unit

SizeUnit = Literal["bytes", "rows"]
CHUNK_ROWS = 1000  # at most so many rows in a chunk: a worker's turn takes a fraction of a second


class Reader(ABC):
    """Rows of one source, as often as asked.

    Attributes:
        where: the source as a message names it.
        unit: what a position counts.
        name: the source's name in `locate`; short, for lists of positions.
    """

    where: str
    unit: Unit
    name: str

    @abstractmethod
    def size(self) -> tuple[int, SizeUnit]:
        """How much there is to read, for a progress bar; an upper bound where rows are limited but not counted."""

    @abstractmethod
    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        """The rows from the first on, each chunk with how far in `size`'s unit reading is after it.

        Args:
            index: number of this source among the sources, kept in the chunks.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when the rows do, and does not when the source is moved."""

    def count(self) -> int:
        """Number of rows, faulty ones too; reads all where the format does not know."""
        return sum(row_count(chunk) for chunk, _ in self.chunks(0))

    def locate(self, position: int) -> str:
        """A row in words, as in `train.jsonl line 3`; for positions that `chunks` has already given."""
        return f"{self.name} {self.unit} {position}"


class Sliced(Reader):
    """Rows `start` to `stop` (exclusive, counted from 0) of another reader; positions stay those of the whole."""

    def __init__(self, reader: Reader, start: int, stop: int) -> None:
        assert start >= 0, "a slice starts at a row"
        self._reader, self._start, self._stop = reader, start, max(start, stop)
        self.where, self.unit, self.name = reader.where, reader.unit, reader.name

    def size(self) -> tuple[int, SizeUnit]:
        return self._stop - self._start, "rows"

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        if self._start == self._stop:
            return
        before = 0  # rows of the inner reader that lie before this chunk
        for chunk, _ in self._reader.chunks(index):
            rows = row_count(chunk)
            if before + rows > self._start:
                wanted = _cut(chunk, self._start - before, self._stop - before)
                yield wanted, min(before + rows, self._stop) - self._start
            before += rows
            if before >= self._stop:
                return

    def fingerprint(self) -> str:
        return digest("slice", self._reader.fingerprint(), str(self._start), str(self._stop))

    def locate(self, position: int) -> str:
        return self._reader.locate(position)


class Joined(Reader):
    """Several readers one after the other; positions run on, and `locate` names the reader that a row came from."""

    def __init__(self, readers: Sequence[Reader], *, where: str, name: str) -> None:
        assert readers, "nothing to join"
        assert len({reader.size()[1] for reader in readers}) == 1, "sizes in one unit"
        units = {reader.unit for reader in readers}
        self._readers = list(readers)
        self._before: list[int] = [0]  # positions that lie before each reader, as far as they are known
        self.where, self.name = where, name
        self.unit = units.pop() if len(units) == 1 else "row"

    def size(self) -> tuple[int, SizeUnit]:
        return sum(reader.size()[0] for reader in self._readers), self._readers[0].size()[1]

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        positions, read = 0, 0
        for number, reader in enumerate(self._readers):
            self._before[number:] = [positions]
            last = 0
            for chunk, done in reader.chunks(index):
                last = chunk.first + len(_items(chunk)) - 1
                yield RawChunk(index, chunk.first + positions, chunk.lines, chunk.values), read + done
            positions += last
            read += reader.size()[0]

    def count(self) -> int:
        return sum(reader.count() for reader in self._readers)

    def fingerprint(self) -> str:
        return digest("join", *(reader.fingerprint() for reader in self._readers))

    def locate(self, position: int) -> str:
        number = bisect_right(self._before, position - 1) - 1
        return self._readers[number].locate(position - self._before[number])


# ---- rows of a chunk ------------------------------------------------------------------------------------------------


def rows_of(chunk: RawChunk) -> Iterator[tuple[int, Any]]:
    """Each row's position and its value, a mapping, or the `RowFault` that says why there is none; never raises."""
    if chunk.values is not None:
        for position, value in enumerate(chunk.values, start=chunk.first):
            yield position, value if isinstance(value, dict | RowFault) else _NO_OBJECT
        return
    assert chunk.lines is not None
    for position, line in enumerate(chunk.lines, start=chunk.first):
        if line:
            yield position, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        value = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RowFault("not UTF-8", fix=SAVE_AS_UTF8)
    except RowFault as fault:
        return fault
    return value if isinstance(value, dict) else _NO_OBJECT


SAVE_AS_UTF8 = "save the file as UTF-8; for one that Windows wrote: `iconv -f CP1252 -t UTF-8 FILE > NEW`"
_ONE_A_LINE = "write one object a line (`jq -c . FILE > NEW.jsonl`), or one list of all rows into a .json file"
_BY_JSON_DUMPS = "these are Python's dicts as str() prints them: write each row with json.dumps(row)"
_NO_OBJECT = RowFault(
    "valid JSON, but not an object", fix="name the file .json if it is one list of all rows, or write one object a line"
)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RowFault: it is not JSON; the text is one of few, so that faults of many rows group.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        if fault.pos >= len(text.rstrip()) or fault.msg.startswith("Unterminated"):
            raise RowFault("not valid JSON: it ends in the middle of a value", fix=_ONE_A_LINE) from None
        python = text.lstrip().startswith("{'")
        raise RowFault(f"not valid JSON: {fault.msg}", fix=_BY_JSON_DUMPS if python else _ONE_A_LINE) from None
    except RecursionError:
        raise RowFault("not valid JSON: nested too deeply") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise RowFault("not valid JSON: a number has too many digits") from None


def row_count(chunk: RawChunk) -> int:
    """Number of rows in a chunk; an empty line is none."""
    return len(chunk.values) if chunk.values is not None else sum(1 for line in _items(chunk) if line)


def sample_row(reader: Reader, *, among: int = 100) -> dict[str, Any]:
    """For each column the first value that is not null among the first usable rows: what a form is recognized by.

    A column that only some rows have, as a system prompt, is seen as well. Empty if the source has no usable row.
    """
    usable = (
        row for chunk, _ in reader.chunks(0) for _, row in rows_of(chunk) if not isinstance(row, RowFault) and row
    )
    sample: dict[str, Any] = {}
    for row in islice(usable, among):
        for column, value in row.items():
            if sample.get(column) is None:
                sample[column] = value
    return sample


def first_row(reader: Reader) -> tuple[int, Any]:
    """Position and value, or `RowFault`, of the first row that there is."""
    return next(row for chunk, _ in reader.chunks(0) for row in rows_of(chunk))


def digest(*parts: str) -> str:
    """A short digest of several texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _items(chunk: RawChunk) -> list[Any]:
    return chunk.lines if chunk.lines is not None else chunk.values or []


def _cut(chunk: RawChunk, start: int, stop: int) -> RawChunk:
    """The chunk from its row `start` to before its row `stop`, both counted without empty lines."""
    if start <= 0 and stop >= row_count(chunk):
        return chunk
    items = _items(chunk)
    rows = [place for place, item in enumerate(items) if chunk.values is not None or item]
    rows = rows[max(start, 0) : max(stop, 0)]
    kept = items[rows[0] : rows[-1] + 1]
    first = chunk.first + rows[0]
    if chunk.lines is not None:
        return RawChunk(chunk.source, first, lines=kept)
    return RawChunk(chunk.source, first, values=kept)


# ---- lines of bytes -------------------------------------------------------------------------------------------------


MAX_LINE = 64 << 20
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"
GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading a damaged or truncated gzip file raises


def open_binary(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed if its name ends in `.gz`."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path) -> Iterator[tuple[list[bytes | RowFault], int]]:
    """Blocks of whole lines without their ends, each with how many bytes of the file are read."""
    begun: list[bytes] = []  # the line that is not at its end yet
    length = 0  # of that line, also where it is too long to be kept

    def finished() -> bytes | RowFault:
        return RowFault(f"longer than {MAX_LINE >> 20} MiB") if length > MAX_LINE else b"".join(begun)

    with path.open("rb") as raw, _unpacked(raw, path) as file:
        at_start = True
        while True:
            try:
                block = file.read(BLOCK)
            except GZIP_DAMAGE:
                yield [RowFault("the compressed file is damaged or ends too early")], raw.tell()
                return
            if not block:
                break
            if at_start:
                block, at_start = block.removeprefix(BOM), False
            first, *more = block.split(b"\n")
            begun.append(first)
            length += len(first)
            if length > MAX_LINE:
                begun.clear()
            if more:
                lines = [finished(), *more[:-1]]
                begun, length = [more[-1]], len(more[-1])
                yield lines, raw.tell()
        if length:
            yield [finished()], raw.tell()


def _unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[return-value]


# ---- Arrow batches --------------------------------------------------------------------------------------------------


# What pyarrow raises for a damaged file; a name that is not UTF-8 is a ValueError.
ARROW_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)
_BAD_ROW = "a value that cannot be read (bad UTF-8, or out of its type's range)"
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def checked(batch: pa.RecordBatch, file_bytes: int) -> pa.RecordBatch:
    """The batch, if each of its offsets lies in its data.

    Raises:
        pa.ArrowException: one does not.
    """
    if batch.num_columns == 0 and batch.num_rows:
        raise pa.ArrowInvalid("rows without a column")
    batch.validate()  # that lengths are possible, and columns equally long
    for column in batch.columns:
        _texts_as_bytes(column, file_bytes).validate(full=True)
    return batch


def _texts_as_bytes(array: Any, file_bytes: int) -> Any:
    """The same buffers with text as bytes, as deep as lists and structs go; nothing is copied, and no offset followed.

    Any other nested array is left as it is, so that bad UTF-8 in it counts as damage.
    """
    kind = array.type
    if pa.types.is_null(kind) and len(array) > 8 * file_bytes:
        raise pa.ArrowInvalid(f"{len(array)} nulls in a file of {file_bytes} bytes")
    own, children = array.buffers(), []
    if kind in _AS_BYTES:
        kind = _AS_BYTES[kind]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        children = [_texts_as_bytes(array.values, file_bytes)]
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        own, kind = own[:2], make(children[0].type)
    elif pa.types.is_struct(kind) and kind.num_fields:
        children = [_texts_as_bytes(array.field(i), file_bytes) for i in range(kind.num_fields)]
        own, kind = own[:1], pa.struct([(str(i), child.type) for i, child in enumerate(children)])
    else:
        return array
    return pa.Array.from_buffers(kind, len(array), own, offset=array.offset, children=children)


def values_of(batch: pa.RecordBatch) -> list[Any]:
    """Rows of an Arrow batch as mappings; a row that has no Python value is a `RowFault`."""
    try:
        rows = batch.to_pylist()
        return [as_written(row) for row in rows] if any(_structs(kind) > 1 for kind in batch.schema.types) else rows
    except (ValueError, OverflowError):  # UnicodeDecodeError is one; only the row itself is lost
        if batch.num_rows == 1:
            return [RowFault(_BAD_ROW)]
        return [value for place in range(batch.num_rows) for value in values_of(batch.slice(place, 1))]


def as_written(row: Any) -> Any:
    """A row without the nulls that Arrow filled in below a turn.

    All structs of a column have all its keys: beside the call `weather(city)` and another that has a `day`, the first
    one has a `day` of null, which nobody wrote and a chat template would write.
    """
    return {name: _without_nulls(value, 0) for name, value in row.items()} if isinstance(row, dict) else row


def _without_nulls(value: Any, structs: int) -> Any:
    if isinstance(value, dict):
        kept = value.items() if structs == 0 else ((key, inner) for key, inner in value.items() if inner is not None)
        return {key: _without_nulls(inner, structs + 1) for key, inner in kept}
    return [_without_nulls(inner, structs) for inner in value] if isinstance(value, list) else value


def _structs(kind: pa.DataType) -> int:
    """How many structs lie inside each other."""
    inner = [kind.field(number).type for number in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return pa.types.is_struct(kind) + max(map(_structs, inner), default=0)
