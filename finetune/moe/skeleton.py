"""The model that a config.json describes, without a byte of weights, and whether the weights beside it fit.

transformers builds its classes from whatever the file holds and fails in a dozen ways, some of them minutes later with
the weights in memory. Built on the meta device first, which takes milliseconds, all of them end in one message; and its
shapes are compared with the shards' headers before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from finetune.checkpoint import (
    GenerationFile,
    TensorInfo,
    blamed_on,
    incomplete,
    read_json,
    read_tensor_infos,
    shard_files,
)
from finetune.errors import ModelError
from finetune.moe.arch import MoeArch, hub_name, role_of
from finetune.values import check_object

GENERATION_FILE = "generation_config.json"


def build_skeleton(config: Mapping[str, Any], where: str) -> PreTrainedModel:
    """The unquantized causal LM of a config.json on the meta device.

    Args:
        where: folder or hub id, for the message.

    Raises:
        ModelError: transformers can make no model of it.
    """
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    with blamed_on(f"{where}/config.json"), torch.device("meta"):
        built = AutoConfig.for_model(config["model_type"], **values)
        return AutoModelForCausalLM.from_config(built)


def check_generation_config(folder: Path) -> None:
    """Checks generation_config.json, where there is one.

    Raises:
        ModelError: it is no JSON, or holds values that transformers refuses.
    """
    file = folder / GENERATION_FILE
    if file.exists():
        content = read_json(file)
        check_object(
            content,
            GenerationFile,
            kind=ModelError,
            name=GENERATION_FILE,
            where=str(file),
            fix="correct the value, or remove the file",
        )
        with blamed_on(file):
            GenerationConfig.from_dict(content)


def require_fitting_weights(folder: Path, arch: MoeArch, skeleton: PreTrainedModel, *, quantized: bool) -> None:
    """Compares the shards' headers with what the config describes, before gigabytes are read.

    Stacked experts and 4-bit weights have shapes of their own; they are looked at where they are read.

    Raises:
        ModelError: a weight is missing or has another shape.
    """
    infos = {info.name: info for shard in shard_files(folder) for info in read_tensor_infos(shard)}
    missing, other = [], []
    for name, parameter in skeleton.named_parameters():
        if role_of(name) == "experts" or (quantized and role_of(name) == "attention"):
            continue
        info = infos.get(hub_name(arch.model_type, name)) or infos.get(name)
        if info is None:
            missing.append(name)
        elif info.shape != tuple(parameter.shape):
            other.append(_says(info, tuple(parameter.shape)))
    for name, shape in arch.hub_expert_shapes():
        if name in infos and infos[name].shape != shape:
            other.append(_says(infos[name], shape))
    if missing:
        raise incomplete(missing)
    if other:
        raise ModelError(
            f"config.json does not belong to these weights: {len(other)} of them have another shape",
            where="; ".join(other[:3]),
            fix="use the config.json that belongs to the checkpoint",
        )


def _says(info: TensorInfo, expected: tuple[int, ...]) -> str:
    return f"{info.name} is {list(info.shape)} in {info.file.name}, the config says {list(expected)}"
