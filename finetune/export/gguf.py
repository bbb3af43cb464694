"""Writes a merged Mixtral as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Names, the order of q's and k's rows and the types are those of llama.cpp's own converter for its `llama` architecture:
the rows of a head go from halves to pairs, since llama.cpp rotates neighbouring rows where transformers rotates halves;
a layer's experts stand in one tensor for gate, up and down each; norms and routers stay float32. F16 and Q8_0 come from
the merged float32 sum in one rounding, by the `gguf` package; smaller types from llama.cpp's quantizer, of an F16 file.

The file is one of tens of gigabytes, so that it is laid out first (gguf_config.py has what it says beside its tensors)
and then filled: `done.json` notes the SHA-256 of each expert's matrix, and a merge that was killed resumes with the
others.

Leaves out the other families, whose tokenizers llama.cpp tells apart by its own list: its converter reads our bf16
folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from finetune.adapter import MergeSource
from finetune.disk import require_space
from finetune.errors import ModelError, OutputError, install_command
from finetune.export.gguf_config import (
    ROPE_FREQS,
    describe_config,
    describe_tokenizer,
    require_written,
    rope_divisors,
)
from finetune.export.serving import write_about
from finetune.export.writing import Partial, made_ahead, resumable
from finetune.moe import EXPERT_PROJECTIONS, expert_place, role_of

WRITTEN_TYPES = ("f16", "q8_0")
# What llama.cpp's quantizer makes of an F16 file: name -> its `llama_ftype`.
QUANTIZER_TYPES = {"q2_k": 10, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}
GGUF_TYPES = (*WRITTEN_TYPES, *QUANTIZER_TYPES)
_FIXED_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT_NAMES = dict(zip(EXPERT_PROJECTIONS, (("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",)), strict=True))


@dataclass(frozen=True)
class Part:
    """What is made at once, uint8 each, and where in the file it goes: (start, size)."""

    places: tuple[tuple[int, int], ...]
    make: Callable[[], Sequence[np.ndarray]]

    @property
    def key(self) -> str:
        """Names the part in done.json."""
        return f"bytes from {self.places[0][0]}"

    @property
    def size(self) -> int:
        return sum(size for _, size in self.places)


@dataclass(frozen=True)
class Layout:
    """A file before it is filled: its first bytes, its whole size, and its parts."""

    header: bytes
    size: int
    parts: list[Part]


def require_gguf(source: MergeSource, type: str) -> None:
    """Checks what a GGUF needs before anything is read.

    Raises:
        ModelError: another family than Mixtral, a config of which a GGUF cannot say everything, or a width that the
            type's blocks do not divide.
        OutputError: the type does not exist, or a package is missing.
    """
    if type not in GGUF_TYPES:
        raise OutputError(
            f"there is no GGUF type {type!r}",
            where="--gguf-type",
            allowed=", ".join(GGUF_TYPES),
            fix="q8_0 keeps the most in 8 bits, q4_k_m is the usual small one",
        )
    if source.arch.model_type != "mixtral":
        raise ModelError(
            f"a GGUF of a {source.arch.model_type} is not written here",
            where=str(source.folder),
            allowed="mixtral",
            fix="merge with --format bf16, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )
    require_written(source.config, AutoConfig.from_pretrained(source.folder), where=str(source.folder))
    needed = {"gguf": install_command("gguf")}
    if type in QUANTIZER_TYPES:
        needed["llama_cpp"] = "pip install llama-cpp-python, or choose --gguf-type q8_0"
    for package, fix in needed.items():
        if importlib.util.find_spec(package) is None:
            raise OutputError(
                f"the GGUF type {type} needs the package {package}, which is not installed",
                where=f"--format gguf --gguf-type {type}",
                fix=fix,
            )


def write_gguf(source: MergeSource, output: Path, *, type: str) -> dict[str, Any]:
    """Writes `<output>/<output's name>-<type>.gguf`, whole or not at all, going on where a killed one stopped.

    Returns what merge.json says, and `made_bytes`.

    Raises:
        FinetuneError: as `require_gguf`; a weight is not finite or too large for float16; a tokenizer of another kind.
        OutputError: the folder is not empty, or the disk is full or broken.
    """
    require_gguf(source, type)
    written = "f16" if type in QUANTIZER_TYPES else type
    tokenizer = source.load_tokenizer()
    name = f"{output.name}-{type}.gguf"
    whole = name if written == type else f"{output.name}-f16.gguf"
    layout = _lay_out(source, tokenizer, written, title=output.name)
    with resumable(output, {**source.identity, "format": "gguf", "type": type}) as partial:
        made = fill(partial, whole, layout, title=f"merge to {written} gguf")
        if whole != name:
            quantize(partial.folder / whole, partial.folder / name, type)
            (partial.folder / whole).unlink()
        sizes = {name: (partial.folder / name).stat().st_size}
        about = {**source.to_dict(), "format": "gguf", "type": type, "files": sizes}
        write_about(partial.folder, about, name=output.name, chat_template=tokenizer.chat_template)
    return {**about, "made_bytes": made}


def fill(partial: Partial, name: str, layout: Layout, *, title: str) -> int:
    """Makes and writes every part that is not there yet, then reads back what it wrote; returns the bytes made anew.

    Raises:
        OutputError: the disk is full, or gives back other bytes than were written.
    """
    path = partial.folder / name
    if not path.is_file() or path.stat().st_size != layout.size:
        with path.open("wb") as stream:
            stream.write(layout.header)
            stream.truncate(layout.size)
    done = partial.done
    todo = [part for part in layout.parts if part.key not in done or done[part.key] != _hashes_in(path, part)]
    anew, total = (sum(part.size for part in parts) for parts in (todo, layout.parts))
    require_space(partial.folder, anew, what="the merged model")
    with (
        path.open("r+b") as stream,
        tqdm(total=total, initial=total - anew, unit="B", unit_scale=True, desc=title, delay=1) as bar,
        contextlib.closing(made_ahead(todo, lambda part: part.make())) as made,
    ):
        for part, arrays in made:
            for (start, size), array in zip(part.places, arrays, strict=True):
                assert array.nbytes == size, (start, size, array.nbytes)
                stream.seek(start)
                stream.write(array.data)
            stream.flush()
            partial.note(part.key, [hashlib.sha256(array.data).hexdigest() for array in arrays])
            bar.update(part.size)
    for part in todo:
        partial.require_written(name, part.key, functools.partial(_hashes_in, path, part))
    return anew


def _hashes_in(path: Path, part: Part) -> list[str]:
    with path.open("rb") as stream:
        hashes = []
        for start, size in part.places:
            stream.seek(start)
            hashes.append(hashlib.sha256(stream.read(size)).hexdigest())
    return hashes


def quantize(source: Path, target: Path, type: str) -> None:
    """A GGUF in a smaller type, by llama.cpp's quantizer.

    Raises:
        OutputError: the quantizer refuses.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTIZER_TYPES[type]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise OutputError(
            f"llama.cpp could not quantize to {type} (status {status})",
            where=str(target),
            allowed="rows that the type's blocks of 256 divide",
            fix="choose --gguf-type q8_0",
        )


def tensor_name(name: str) -> str:
    """What llama.cpp calls a parameter that is no expert's."""
    if name in _FIXED_NAMES:
        return _FIXED_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def heads_in_pairs(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    out, in_ = weight_OI.shape
    return weight_OI.view(heads, 2, out // heads // 2, in_).transpose(1, 2).reshape(out, in_)


def _lay_out(source: MergeSource, tokenizer: PreTrainedTokenizerBase, type: str, *, title: str) -> Layout:
    import gguf

    big = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[big]
    arch = source.arch
    for in_ in {shape[-1] for name, shape in source.shapes.items() if role_of(name) not in ("norm", "router")}:
        if in_ % block:
            raise ModelError(
                f"rows of {in_} weights do not fill the blocks of {type}",
                where=str(source.folder),
                allowed=f"multiples of {block}",
                fix="choose --gguf-type f16",
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in source.shapes.items():
        if role_of(name) == "experts":
            layer, projection = expert_place(name)
            names = _EXPERT_NAMES[projection]
            experts, out, in_ = shape
            shapes |= {f"blk.{layer}.{tensor}.weight": (experts, out // len(names), in_) for tensor in names}
        else:
            shapes[tensor_name(name)] = shape
    plain = {tensor_name(name) for name in source.shapes if role_of(name) in ("norm", "router")}
    divisors = rope_divisors(arch, AutoConfig.from_pretrained(source.folder))
    if divisors is not None:
        shapes[ROPE_FREQS] = tuple(divisors.shape)
        plain.add(ROPE_FREQS)
    sizes = {n: prod(s) * 4 if n in plain else prod(s) // block * block_bytes for n, s in shapes.items()}

    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name(title)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_config(writer, arch, source.config, AutoConfig.from_pretrained(source.folder))
    describe_tokenizer(writer, tokenizer, arch.vocab)
    for name, shape in shapes.items():
        raw = gguf.GGMLQuantizationType.F32 if name in plain else big
        writer.add_tensor_info(name, shape, np.dtype(np.float16), sizes[name], raw_dtype=raw)
    header = _header(writer)
    starts, end = {}, len(header)
    for name in shapes:
        starts[name], end = end, end + writer.ggml_pad(sizes[name], writer.data_alignment)

    def quantized(tensor: Tensor) -> np.ndarray:
        return gguf.quants.quantize(tensor.contiguous().numpy(), big).view(np.uint8).reshape(-1)

    dtype = torch.float16 if type == "f16" else torch.float32
    parts = []
    if divisors is not None:
        rope = divisors.numpy().view(np.uint8)
        parts.append(Part(((starts[ROPE_FREQS], sizes[ROPE_FREQS]),), lambda: [rope]))
    for name in source.shapes:
        if role_of(name) == "experts":
            layer, projection = expert_place(name)
            tensors = [f"blk.{layer}.{tensor}.weight" for tensor in _EXPERT_NAMES[projection]]
            for expert in range(arch.experts):
                each = [sizes[tensor] // arch.experts for tensor in tensors]
                places = ((starts[t] + expert * size, size) for t, size in zip(tensors, each, strict=True))
                parts.append(Part(tuple(places), _expert(source, layer, expert, projection, dtype, quantized)))
        else:
            target = tensor_name(name)
            in_float = target in plain
            make = _parameter(source, name, torch.float32 if in_float else dtype, None if in_float else quantized)
            parts.append(Part(((starts[target], sizes[target]),), make))
    return Layout(header, end, parts)


def _parameter(
    source: MergeSource, name: str, dtype: torch.dtype, quantized: Callable[[Tensor], np.ndarray] | None
) -> Callable[[], Sequence[np.ndarray]]:
    heads = {"q_proj": source.arch.heads, "k_proj": source.arch.kv_heads}.get(name.split(".")[-2])

    def make() -> Sequence[np.ndarray]:
        weight = source.parameter(name, dtype)
        if heads is not None:
            weight = heads_in_pairs(weight, heads)
        return [weight.numpy().view(np.uint8).reshape(-1) if quantized is None else quantized(weight)]

    return make


def _expert(
    source: MergeSource,
    layer: int,
    expert: int,
    projection: str,
    dtype: torch.dtype,
    quantized: Callable[[Tensor], np.ndarray],
) -> Callable[[], Sequence[np.ndarray]]:
    def make() -> Sequence[np.ndarray]:
        matrix = source.expert(layer, expert, projection, dtype)
        return [quantized(part) for part in matrix.chunk(len(_EXPERT_NAMES[projection]))]

    return make


def _header(writer: Any) -> bytes:
    """Everything before the first tensor's bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % writer.data_alignment)
