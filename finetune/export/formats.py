"""The two folders of safetensors that a merge writes, tensor by tensor, without ever building the model.

16 bits (bf16, fp16): a plain checkpoint in the layout of the hub, which every engine reads. The experts' matrices stand
one by one under the names that the family has there (Mixtral: `block_sparse_moe.experts.N.w1/w2/w3`). Merged onto the
base that was trained, an expert's weight is the value that its NF4 bytes stand for: what was trained is what is served.
Merged onto the original, the experts are the original ones: a model that nobody trained, though often as good.

nf4: the experts' own bytes, as this toolkit serves them. They are copied from a quantized base, or made from a 16-bit
one matrix by matrix as training made them; the rest is the base's or what was tuned, rounded once to 16 bits. The live
model computes dequant(W) x + s B A x; merged, attention is W' = dequant(W) + s B A, summed in float32 and rounded once.
So the merged model differs from the live adapter by one rounding. Rounding W' back onto the NF4 grid instead loses most
of a small update: at |update| / |W| of 1% only 1% of it survives (PEFT's 4-bit `merge_and_unload`). Names, shapes,
dtypes and bytes are those that `save_pretrained` writes of a model that was merged in memory.
"""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.adapter import MergeSource
from finetune.checkpoint import read_json
from finetune.disk import write_json
from finetune.export.serving import write_about
from finetune.export.writing import Item, parse_size, resumable, write_shards
from finetune.kernels import PackedExperts, empty_experts
from finetune.moe import Moe4bitConfig, expert_place, hub_expert_names, hub_name, refuse_without_toolkit, role_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write_folder(
    source: MergeSource, output: Path, *, format: str, shard_size: str, attention: str = "bf16"
) -> dict[str, Any]:
    """Writes the merged model to `output`, whole or not at all, resuming what a killed merge left.

    Args:
        source: for the nf4 format, onto what was trained.
        format: "nf4", or a key of `DTYPES`.
        shard_size: the largest size of a file, like "4GB", of which one is in memory; in the nf4 format
            a layer's packed expert weights are not divided.
        attention: of the nf4 format, a key of `DTYPES`: fp16 rounds 8 times finer, which reaches the answers where the
            model runs in float16 or float32.

    Returns what merge.json says, and `made_bytes`, what was not there from an earlier start.

    Raises:
        AdapterError: a merged weight is not finite, or the experts are not those that were trained.
        ModelError: a weight is too large for float16.
        OutputError: the folder is not empty, the disk is full or broken, or the size cannot be read.
    """
    limit = parse_size(shard_size)
    tokenizer = source.load_tokenizer()
    kept = {"format": "nf4", "attention": attention} if format == "nf4" else {"format": format}
    items = _nf4_items(source, DTYPES[attention]) if format == "nf4" else _plain_items(source, DTYPES[format])
    with resumable(output, {**source.identity, **kept, "shard_size": limit}) as filled:
        files, made = write_shards(filled, items, limit, title=f"merge to {format}")
        folder = filled.folder
        source.copy_generation_config(folder)
        tokenizer.save_pretrained(folder)
        if format == "nf4":
            _save_nf4_config(source, folder)
        else:
            write_json(folder / "config.json", plain_config(source.config, format))
            _name_tokenizer_for_all(folder)
        about = {**source.to_dict(), **kept, "files": files}
        write_about(folder, about, name=output.name)
    return {**about, "made_bytes": made}


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


def _plain_items(source: MergeSource, dtype: torch.dtype) -> list[Item]:
    """All tensors in order of the layers, by the hub's names."""
    items = []
    kind = source.arch.model_type
    for name, shape in source.shapes.items():
        if role_of(name) != "experts":
            make = partial(_parameter, source, name, hub_name(kind, name), dtype)
            items.append(Item(prod(shape) * dtype.itemsize, make))
            continue
        layer, projection = expert_place(name)
        size = prod(shape[1:]) * dtype.itemsize
        items += [Item(size, partial(_matrices, source, layer, e, projection, dtype)) for e in range(shape[0])]
    return items


def _nf4_items(source: MergeSource, attention: torch.dtype) -> list[Item]:
    """All tensors in order of the layers, by transformers' names; an item is a layer's packed expert weights."""
    assert source.weights.onto == "trained", "experts that were not trained have no bytes of training"
    items = []
    for name, shape in source.shapes.items():
        if role_of(name) != "experts":
            dtype = attention if role_of(name) == "attention" else torch.bfloat16
            items.append(Item(prod(shape) * dtype.itemsize, partial(_parameter, source, name, name, dtype)))
            continue
        size = sum(field.nbytes for field in _empty_experts(source, shape, "meta"))
        items.append(Item(size, partial(_experts, source, name, shape)))
    return items


def _parameter(source: MergeSource, name: str, stored: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {stored: source.parameter(name, dtype)}


def _matrices(source: MergeSource, layer: int, expert: int, projection: str, dtype: torch.dtype) -> dict[str, Tensor]:
    names = hub_expert_names(source.arch.model_type, layer, expert, projection)
    matrix = source.expert(layer, expert, projection, dtype)
    return dict(zip(names, matrix.chunk(len(names)), strict=True))


def _experts(source: MergeSource, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    layer, projection = expert_place(name)
    weights = _empty_experts(source, shape, "cpu")
    for expert in range(shape[0]):
        for field, of_expert in zip(weights, source.weights.packed(layer, expert, projection), strict=True):
            field[expert] = of_expert[0]
    return {f"{name}_{field}": tensor for field, tensor in weights._asdict().items()}


def _empty_experts(source: MergeSource, shape: tuple[int, ...], device: str) -> PackedExperts:
    experts, out, in_ = shape
    return empty_experts(source.weights.experts, experts, out, in_, device)


def _save_nf4_config(source: MergeSource, folder: Path) -> None:
    """config.json as `save_pretrained` of the merged model writes it, and a refusal of those who cannot read it."""
    config = AutoConfig.from_pretrained(source.folder)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = "bfloat16"
    config.quantization_config = Moe4bitConfig(attention="16bit", experts=source.weights.experts)
    config.save_pretrained(folder)
    refuse_without_toolkit(folder)


def _name_tokenizer_for_all(folder: Path) -> None:
    """transformers 5 saves a class name that 4 does not know; both know the older name of the same class."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
