"""safetensors shards of a stated size, planned before a tensor is made.

The header of a safetensors file says where each tensor lies, and all shapes and dtypes are known before the merge
begins. So every file is laid out first, and then its tensors are made one by one, or in runs of rows where a tensor
stacks all experts of a layer: what is in memory is one run. Tensors stand in a file by the size of their numbers,
largest first, which keeps each of them aligned, as safetensors' own writer has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import OutputError
from finetune.export.resumable import OutputFile, Part, Partial, Place
from finetune.runfolder import write_json

_HEADER_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Make = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Stored:
    """What a file holds of a tensor beside its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Made:
    """Tensors that lie in one file and are made at once, in as many runs of rows as there are functions.

    runs: the i-th of n gives, for every tensor in order, the i-th of n equal runs of its rows.
    """

    tensors: dict[str, Stored]
    runs: Sequence[Make]

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())


def write_shards(partial: Partial, made: Sequence[Made], limit: int, *, title: str) -> tuple[dict[str, int], int]:
    """Writes every tensor, and the index where they fill several files.

    Args:
        limit: the largest size of a file in bytes; more only where what is `Made` at once is larger.

    Returns the files' sizes by name, and how many bytes were made anew.

    Raises:
        OutputError: as `Partial.write`.
    """
    files, parts, weight_map = _lay_out(made, limit)
    anew = partial.write(files, parts, title=title)
    if len(files) > 1:
        total = {"total_size": sum(part.size for part in parts)}
        index = partial.folder / "model.safetensors.index.json"
        write_json(index, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return {name: file.size for name, file in files.items()}, anew


def parse_size(text: str) -> int:
    """Bytes of a size like `4GB`, `500 MB` or `2GiB`.

    Raises:
        OutputError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 1 <= size < 2**63:
        raise OutputError(
            f"{text!r} is not a size",
            where="--shard-size",
            allowed="a number with KB, MB, GB, KiB, MiB or GiB",
            fix="give a size like 4GB",
        )
    return int(size)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8 [n]; not copied where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _lay_out(made: Sequence[Made], limit: int) -> tuple[dict[str, OutputFile], list[Part], dict[str, str]]:
    """Files, parts and the index's weight map: shards filled in order."""
    shards: list[list[Made]] = [[]]
    size = 0
    for one in made:
        if shards[-1] and size + one.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.size
    files: dict[str, OutputFile] = {}
    parts: list[Part] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, starts, total = _header({name: tensor for one in shard for name, tensor in one.tensors.items()})
        files[file] = OutputFile(header, total)
        for one in shard:
            parts += _parts(one, file, starts)
            weight_map |= dict.fromkeys(one.tensors, file)
    return files, parts, weight_map


def _parts(made: Made, file: str, starts: dict[str, int]) -> list[Part]:
    """A part for every run of rows."""
    parts = []
    for number, make in enumerate(made.runs):
        places = []
        for name, tensor in made.tensors.items():
            size, rest = divmod(tensor.size, len(made.runs))
            assert not rest, (name, tensor)
            places.append(Place(file, starts[name] + number * size, size))

        def run(make: Make = make) -> Sequence[np.ndarray]:
            return [as_bytes(tensor) for tensor in make()]

        parts.append(Part(tuple(places), run))
    return parts


def _header(tensors: dict[str, Stored]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header, where in the file each tensor begins, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name], end = end, end + tensor.size
        entries[name] = {
            "dtype": _HEADER_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end
