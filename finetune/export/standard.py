"""Writes a merge as a plain 16-bit checkpoint in the layout of the hub, which every engine reads.

The experts' matrices stand one by one under the names that the family has on the hub (Mixtral:
`block_sparse_moe.experts.N.w1/w2/w3`), in safetensors shards of a stated size. What reads them, a shard's size apart,
is memory for one expert's matrix: the header of a shard is known before its tensors are, since all shapes are.

Merged onto the base that was trained, an expert's weight is the value that its NF4 bytes stand for: what was trained is
what is served, in 16 bits. Merged onto the original, the experts are the original ones: a model that nobody trained,
often as good (`fidelity.json` of the nf4 format measures only the first).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.arch import EXPERT_PROJECTIONS, hub_expert_names, hub_name, role_of
from finetune.errors import OutputError
from finetune.export.resumable import OutputFile, Part, Place, resumable
from finetune.export.serving import write_serving
from finetune.export.source import MergeSource
from finetune.runfolder import write_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HEADER_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MERGE_FILE = "merge.json"


@dataclass(frozen=True)
class _Made:
    """Tensors that are made at once: names and shapes, and how."""

    shapes: dict[str, tuple[int, ...]]
    make: Callable[[], Sequence[Tensor]]

    def bytes_in(self, dtype: torch.dtype) -> int:
        return sum(prod(shape) for shape in self.shapes.values()) * dtype.itemsize


def write_standard(source: MergeSource, output: Path, *, format: str, shard_size: str) -> dict[str, Any]:
    """Writes the merged checkpoint to `output`, whole or not at all, going on where a killed one stopped.

    Args:
        format: a key of `DTYPES`.
        shard_size: the largest size of a file, like "4GB".

    Returns what merge.json says, and `made_bytes`, what was not there from an earlier start.

    Raises:
        AdapterError: a merged weight is not finite.
        ModelError: a weight is too large for float16.
        OutputError: the folder is not empty, the disk is full or broken, or the size cannot be read.
    """
    dtype = DTYPES[format]
    limit = parse_size(shard_size)
    tokenizer = source.load_tokenizer()
    files, parts, weight_map = _lay_out(_plan(source, dtype), dtype, limit)
    job = {**source.identity, "format": format, "shard_size": limit}
    with resumable(output, job) as partial:
        made = partial.write(files, parts, title=f"merge to {format}")
        folder = partial.folder
        if len(files) > 1:
            total = {"total_size": sum(part.size for part in parts)}
            write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
        write_json(folder / "config.json", plain_config(source.config, format))
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_for_all(folder)
        about = {**source.to_dict(), "format": format, "files": {name: file.size for name, file in files.items()}}
        write_json(folder / MERGE_FILE, about)
        write_serving(folder, about, name=output.name, chat_template=None)
    return {**about, "made_bytes": made}


def parse_size(text: str) -> int:
    """Bytes of a size like `4GB`, `500 MB` or `2GiB`.

    Raises:
        OutputError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if not size:
        raise OutputError(
            f"{text!r} is not a size",
            where="--shard-size",
            allowed="a number with KB, MB, GB, KiB, MiB or GiB",
            fix="give a size like 4GB",
        )
    return size


def plain_config(config: dict[str, Any], format: str) -> dict[str, Any]:
    """A base's config.json for 16-bit weights, with the keys that readers before transformers 5 look for as well.

    Without `rope_theta` at the top they would take their own default for it without a word.
    """
    name = str(DTYPES[format]).removeprefix("torch.")
    plain = {**config, "dtype": name, "torch_dtype": name}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        plain.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain.setdefault("rope_scaling", None if rope.get("rope_type", "default") == "default" else scaling)
    return plain


def _plan(source: MergeSource, dtype: torch.dtype) -> list[_Made]:
    """All tensors in order of the layers."""
    made = []
    arch = source.arch
    for name, shape in source.shapes.items():
        if role_of(name) != "experts":

            def parameter(name: str = name) -> Sequence[Tensor]:
                return [source.parameter(name, dtype)]

            made.append(_Made({hub_name(arch.model_type, name): shape}, parameter))
            continue
        layer, projection = int(name.split(".")[2]), name.rpartition(".")[2]
        assert projection in EXPERT_PROJECTIONS, name
        for expert in range(arch.experts):
            names = hub_expert_names(arch.model_type, layer, expert, projection)
            matrix = (shape[1] // len(names), shape[2])

            def matrices(
                layer: int = layer, expert: int = expert, projection: str = projection, count: int = len(names)
            ) -> Sequence[Tensor]:
                return source.expert(layer, expert, projection, dtype).chunk(count)

            made.append(_Made(dict.fromkeys(names, matrix), matrices))
    return made


def _lay_out(
    made: Sequence[_Made], dtype: torch.dtype, limit: int
) -> tuple[dict[str, OutputFile], list[Part], dict[str, str]]:
    """Files, parts and the index's weight map: shards filled in order, none above the limit unless by one part."""
    shards: list[list[_Made]] = [[]]
    size = 0
    for one in made:
        if shards[-1] and size + one.bytes_in(dtype) > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.bytes_in(dtype)
    files: dict[str, OutputFile] = {}
    parts: list[Part] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, starts, total = _header({key: s for one in shard for key, s in one.shapes.items()}, dtype)
        files[name] = OutputFile(header, total)
        for one in shard:
            places = (Place(name, starts[key], prod(s) * dtype.itemsize) for key, s in one.shapes.items())
            parts.append(Part(tuple(places), lambda one=one: [as_bytes(tensor) for tensor in one.make()]))  # type: ignore[misc]
            weight_map |= dict.fromkeys(one.shapes, name)
    return files, parts, dict(sorted(weight_map.items()))


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header for tensors of one dtype, where in the file each begins, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        offsets[name], end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _HEADER_DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8 [n]; not copied where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _name_tokenizer_for_all(folder: Path) -> None:
    """transformers 5 saves a class name that 4 does not know; both know the older name of the same class."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
