"""The header of a safetensors file, checked: the one place that reads it.

A safetensors file begins with the length of a JSON header that places every tensor, so a truncated file shows in its
size, without reading its gigabytes. The library that reads the tensors later opens the file here as well, so that what
it refuses (dtypes, shapes, offsets) is refused now.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finetune.checkpoint.json_file import NotJson, parse_json
from finetune.errors import FinetuneError, ModelError
from finetune.values import shown

_LARGEST = 100_000_000  # bytes; safetensors reads no larger header
_LFS_POINTER = int.from_bytes(b"version ", "little")  # what its first bytes are as the length of a header


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, as its header states it; `start` is where in the file its bytes begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def check_safetensors(file: Path, *, kind: type[FinetuneError] = ModelError) -> None:
    """Checks that a safetensors file is whole and that the library that will read it accepts it.

    Raises:
        FinetuneError: of the given kind.
    """
    read_header(file, kind=kind)


def read_tensor_infos(file: Path, *, kind: type[FinetuneError] = ModelError) -> tuple[TensorInfo, ...]:
    """The tensors that the file's header names.

    Raises:
        FinetuneError: of the given kind, if header or size are wrong.
    """
    return read_header(file, kind=kind).tensors


def read_header(file: Path, *, kind: type[FinetuneError] = ModelError) -> Header:
    """The header of a safetensors file that has as many bytes as it places.

    Raises:
        FinetuneError: of the given kind.
    """

    def broken(what: str) -> FinetuneError:
        return kind(f"{file.name} is {what}", where=str(file), fix="download or copy the file again")

    try:
        size, length, content = _read(file)
    except OSError as error:
        fix = "check the file and its permissions"
        raise kind(f"{file.name} cannot be read: {error.strerror}", where=str(file), fix=fix) from None
    if length is None:
        raise broken(f"truncated: {size} bytes are too few for a safetensors header")
    if length == _LFS_POINTER:
        fix = "fetch the weights with `git lfs pull`, or download the file again"
        raise kind(f"{file.name} is only a pointer of Git LFS, {size} bytes of text", where=str(file), fix=fix)
    if 8 + length > size:
        raise broken(f"truncated or corrupt: its header claims {length} bytes, the file has {size}")
    if length > _LARGEST:
        raise broken(f"corrupt: its header claims {length:,} bytes, more than safetensors reads")
    try:
        header = parse_json(content)
    except NotJson as error:
        raise broken(f"corrupt: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise broken("corrupt: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    infos, end = [], 0
    for name, placed in header.items():
        match placed:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if _sizes(shape):
                infos.append(TensorInfo(name, dtype, tuple(shape), file, 8 + length + start))
                end = max(end, stop)
            case _:
                raise broken(f"corrupt: its header does not place its tensors ({shown(name)})")
    if size != 8 + length + end:
        raise broken(f"truncated or corrupt: {size} bytes where its header places {8 + length + end}")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise broken(f"corrupt: {error}") from None
    return Header(tuple(infos), metadata)


def _sizes(shape: list[object]) -> bool:
    return all(isinstance(size, int) and size >= 0 for size in shape)


def _read(file: Path) -> tuple[int, int | None, bytes]:
    """Size of the file, length that its header claims (None: no room for one), and the header's bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return size, None, b""
        (length,) = struct.unpack("<Q", prefix)
        return size, length, stream.read(length) if 8 + length <= size and length <= _LARGEST else b""
