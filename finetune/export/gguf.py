"""Writes a merged Mixtral as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Names, the order of q's and k's rows and the types are those of llama.cpp's own converter for its `llama` architecture:
the rows of a head go from halves to pairs, since llama.cpp rotates neighbouring rows where transformers rotates halves;
a layer's experts stand in one tensor for gate, up and down each; norms and routers stay float32. F16 and Q8_0 come from
the merged float32 sum in one rounding, by the `gguf` package; smaller types from llama.cpp's quantizer, of an F16 file.

The tokenizer goes along as llama.cpp's sentencepiece kind. A tokenizer.json has merges where that kind has scores:
a token's score is minus the rank of the first merge that makes it, so the same pair is merged first.

Leaves out the other families, whose tokenizers llama.cpp tells apart by its own list: its converter reads our bf16
folders.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from finetune.errors import ModelError, OutputError
from finetune.export.gguf_config import ROPE_FREQS, describe_config, require_written, rope_divisors
from finetune.export.resumable import OutputFile, Part, Place, resumable
from finetune.export.serving import write_serving
from finetune.export.shards import as_bytes
from finetune.export.source import MergeSource
from finetune.export.standard import MERGE_FILE
from finetune.moe import EXPERT_PROJECTIONS, MoeArch, role_of
from finetune.runfolder import write_json

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
    needed = {"gguf": "pip install 'moe-qlora[gguf]'"}
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
    file, parts = _lay_out(source, tokenizer, written, whole, title=output.name)
    with resumable(output, {**source.identity, "format": "gguf", "type": type}) as partial:
        made = partial.write({whole: file}, parts, title=f"merge to {written} gguf")
        if whole != name:
            quantize(partial.folder / whole, partial.folder / name, type)
            (partial.folder / whole).unlink()
        sizes = {name: (partial.folder / name).stat().st_size}
        about = {**source.to_dict(), "format": "gguf", "type": type, "files": sizes}
        write_json(partial.folder / MERGE_FILE, about)
        write_serving(partial.folder, about, name=output.name, chat_template=tokenizer.chat_template)
    return {**about, "made_bytes": made}


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


def spm_tokens(tokenizer_json: dict[str, Any], *, where: str) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and llama.cpp's types of all tokens, in order of ids.

    Raises:
        ModelError: not a BPE with byte fallback as Llama and Mistral have it.
    """
    model = tokenizer_json["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ModelError(
            "the tokenizer is not of the sentencepiece kind that a Mixtral's GGUF holds",
            where=f"{where}: tokenizer.json",
            allowed="BPE with byte_fallback, as Mistral's",
            fix="merge with --format bf16, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )
    special = {token["id"]: bool(token["special"]) for token in tokenizer_json["added_tokens"]}
    texts = {id: text for text, id in model["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in tokenizer_json["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    tokens, scores, types = [], [], []
    for id in range(max(texts) + 1):
        text = texts.get(id, f"[PAD{id}]")
        tokens.append(text)
        scores.append(-float(ranks.get(text, len(model["merges"]) if id in texts else 0)))
        types.append(_token_type(id, text, texts, special, model.get("unk_token")))
    return tokens, scores, types


def without_generation_tags(template: str) -> str:
    """The same texts by a template that also readers without transformers' `generation` block can read.

    An empty expression in the block's place keeps what its dashes trimmed.
    """
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{{\1 '' \2}}", template)


def _token_type(id: int, text: str, texts: dict[int, str], special: dict[int, bool], unknown: str | None) -> int:
    """llama.cpp's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    if id not in texts:
        return 5
    if text == unknown:
        return 2
    if id in special:
        return 3 if special[id] else 4
    return 6 if re.fullmatch("<0x[0-9A-F]{2}>", text) else 1


def _lay_out(
    source: MergeSource, tokenizer: PreTrainedTokenizerBase, type: str, file: str, *, title: str
) -> tuple[OutputFile, list[Part]]:
    """The file with its header and everything known beforehand, and the parts of its tensors."""
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
            layer, projection = _expert_place(name)
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
    _describe(writer, source, tokenizer, title=title, file_type=gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
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
        parts.append(Part((Place(file, starts[ROPE_FREQS], sizes[ROPE_FREQS]),), lambda: [as_bytes(divisors)]))
    for name in source.shapes:
        if role_of(name) == "experts":
            layer, projection = _expert_place(name)
            tensors = [f"blk.{layer}.{tensor}.weight" for tensor in _EXPERT_NAMES[projection]]
            for expert in range(arch.experts):
                each = [sizes[tensor] // arch.experts for tensor in tensors]
                places = (Place(file, starts[t] + expert * size, size) for t, size in zip(tensors, each, strict=True))
                parts.append(Part(tuple(places), _expert(source, layer, expert, projection, dtype, quantized)))
        else:
            target = tensor_name(name)
            place = Place(file, starts[target], sizes[target])
            in_float = target in plain
            parts.append(
                Part(
                    (place,),
                    _parameter(source, name, torch.float32 if in_float else dtype, None if in_float else quantized),
                )
            )
    return OutputFile(header, end), parts


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


def _expert_place(name: str) -> tuple[int, str]:
    return int(name.split(".")[2]), name.rpartition(".")[2]


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


def _describe(
    writer: Any, source: MergeSource, tokenizer: PreTrainedTokenizerBase, *, title: str, file_type: int
) -> None:
    import gguf

    arch: MoeArch = source.arch
    writer.add_name(title)
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_config(writer, arch, source.config, AutoConfig.from_pretrained(source.folder))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        saved = json.loads((Path(scratch) / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, scores, types = spm_tokens(saved, where=str(tokenizer.name_or_path))
    missing = arch.vocab - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + n}]" for n in range(missing))])
    writer.add_token_scores([*scores, *[0.0] * missing])
    writer.add_token_types([*types, *[5] * missing])
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if id is not None:
            add(id)
    # As the tokenizer itself does with a text.
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.tokenize("x")[0].startswith("▁"))
    if tokenizer.chat_template:
        writer.add_chat_template(without_generation_tags(tokenizer.chat_template))
