"""RMSNorm and rotary embedding as one kernel each, from liger-kernel, where it is installed.

Why: written in torch, both are chains of elementwise kernels over [T, H], partly in float32, whose intermediate results
are kept for the backward pass. Fused they take 13 of 843 ms of a step (H100, 8 x 1024 tokens of Mixtral 8x7B).

How: liger-kernel's public functions, applied to one loaded model. Its replacements for the experts and for the LM head
stay off: the experts are ours, and TRL's trainer has its own fused head. Note that liger-kernel also exchanges the
rotary function and the norm's class in transformers' module, for every model of that type built later in the process.

Leaves out: the CPU (its kernels are Triton's).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from transformers import PreTrainedModel

from finetune.errors import ModelError, install_command

FusedLayers = Literal["auto"] | bool
# The model types for which liger-kernel 0.8.5 has them.
SUPPORTED = ("mixtral", "qwen3_moe")


def wants_fused_layers(wanted: FusedLayers, device: torch.device, model_type: str) -> bool:
    """Whether a model gets them; auto: on a GPU, with liger-kernel installed, where it knows the model type.

    Raises:
        ModelError: they are asked for and cannot be had.
    """
    if wanted is False:
        return False
    installed = find_spec("liger_kernel") is not None
    obstacles = {
        "the package liger-kernel is not installed": not installed,
        f"the model is on the {device.type}": device.type != "cuda",
        f"liger-kernel has none for {model_type}": model_type not in SUPPORTED,
    }
    found = [obstacle for obstacle, holds in obstacles.items() if holds]
    if wanted is True and found:
        raise ModelError(
            f"fused layers are asked for, but {', and '.join(found)}",
            where="model.fused_layers",
            allowed=f"auto, true (on a GPU, with liger-kernel, for {', '.join(SUPPORTED)}), false",
            fix="set model.fused_layers=auto" if installed else f"{install_command('kernels')}, or choose auto",
        )
    return not found


def fuse_layers(model: PreTrainedModel) -> None:
    """Exchanges the norms and the rotary embedding of `model`, in place."""
    from liger_kernel.transformers import (  # here, because it imports triton
        apply_liger_kernel_to_mixtral,
        apply_liger_kernel_to_qwen3_moe,
    )

    apply = {
        "mixtral": apply_liger_kernel_to_mixtral,
        "qwen3_moe": apply_liger_kernel_to_qwen3_moe,
    }[model.config.model_type]
    apply(rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
