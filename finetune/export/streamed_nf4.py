"""Writes a merge with the experts' own bytes: the folder that this toolkit serves, and the model that was trained.

The live model computes dequant(W) x + s B A x. Merged, attention is W' = dequant(W) + s B A, summed in float32 and
rounded once, in a 16-bit linear layer. The experts' bytes are copied from a quantized base, or made from a 16-bit one
matrix by matrix as training made them; all else is the base's, or what was tuned, rounded once to bfloat16. So the
merged model differs from the live adapter by one rounding. Rounding W' back onto the NF4 grid instead loses most of a
small update: at |update| / |W| of 1% only 1% of it survives (PEFT's 4-bit `merge_and_unload`).

Names, shapes, dtypes and bytes are those that `save_pretrained` writes of a model merged in memory, but no model is
built: what is in memory is one expert's matrix. Leaves out: how far the result is from the live adapter (command.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.export.resumable import resumable
from finetune.export.serving import write_serving
from finetune.export.shards import Made, Stored, parse_size, write_shards
from finetune.export.source import MergeSource
from finetune.export.standard import DTYPES, MERGE_FILE
from finetune.kernels import empty_experts
from finetune.moe import EXPERT_PROJECTIONS, Moe4bitConfig, refuse_without_toolkit, role_of
from finetune.runfolder import write_json

MERGED_DTYPE = torch.bfloat16


def write_nf4(source: MergeSource, output: Path, *, shard_size: str, attention: str = "bf16") -> dict[str, Any]:
    """Writes the merged model to `output`, whole or not at all, going on where a killed one stopped.

    Args:
        source: onto what was trained.
        shard_size: the largest size of a file, like "4GB"; a layer's stack of experts' matrices is not divided.
        attention: a key of `DTYPES`, for the attention's weights: fp16 rounds 8 times finer, which reaches the answers
            where the model is run in float16 or float32.

    Returns what merge.json says, and `made_bytes`, what was not there from an earlier start.

    Raises:
        AdapterError: a merged weight is not finite.
        ModelError: a weight is too large for float16.
        OutputError: the folder is not empty, the disk is full or broken, or the size cannot be read.
    """
    assert source.weights.onto == "trained", "experts that were not trained have no bytes of training"
    limit = parse_size(shard_size)
    tokenizer = source.load_tokenizer()
    job = {**source.identity, "format": "nf4", "attention": attention, "shard_size": limit}
    plan = _plan(source, DTYPES[attention])
    with resumable(output, job) as filled:
        files, anew = write_shards(filled, plan, limit, title=f"merge onto {source.weights.experts} experts")
        folder = filled.folder
        _save_config(source, folder)
        source.copy_generation_config(folder)
        tokenizer.save_pretrained(folder)
        about = {**source.to_dict(), "format": "nf4", "attention": attention, "files": files}
        write_json(folder / MERGE_FILE, about)
        write_serving(folder, about, name=output.name, chat_template=None)
    return {**about, "made_bytes": anew}


def _plan(source: MergeSource, attention: torch.dtype) -> list[Made]:
    """All tensors in order of the layers."""
    made = []
    for name, shape in source.shapes.items():
        if role_of(name) != "experts":
            dtype = attention if role_of(name) == "attention" else MERGED_DTYPE
            made.append(Made({name: Stored(dtype, shape)}, [partial(_parameter, source, name, dtype)]))
            continue
        experts, out, in_ = shape
        layer, projection = int(name.split(".")[2]), name.rpartition(".")[2]
        assert projection in EXPERT_PROJECTIONS, name
        fields = empty_experts(source.weights.experts, experts, out, in_, "meta")._asdict()
        stack = {f"{name}_{field}": Stored(tensor.dtype, tuple(tensor.shape)) for field, tensor in fields.items()}
        made.append(
            Made(stack, [partial(source.weights.stack, layer, expert, projection) for expert in range(experts)])
        )
    return made


def _parameter(source: MergeSource, name: str, dtype: torch.dtype) -> Sequence[Tensor]:
    return [source.parameter(name, dtype)]


def _save_config(source: MergeSource, folder: Path) -> None:
    """config.json as `save_pretrained` of the merged model writes it, and a refusal of those who cannot read it."""
    config = AutoConfig.from_pretrained(source.folder)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = str(MERGED_DTYPE).removeprefix("torch.")
    config.quantization_config = Moe4bitConfig(attention="16bit", experts=source.weights.experts)
    config.save_pretrained(folder)
    refuse_without_toolkit(folder)
