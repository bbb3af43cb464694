"""Lines of a file as bytes, a block at a time, also out of gzip.

Why: a file larger than memory may hold one line larger than memory, and Python's own iteration over lines reads it
whole. How: blocks of a MiB are split at newlines; a line beyond 64 MiB is skipped, and a `RowFault` stands
in its place. Leaves out what a line means.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from finetune.data.rows import RowFault

MAX_LINE = 64 << 20
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading a damaged or truncated gzip file raises


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
            except DAMAGE:
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
