"""A recipe's memory estimate, from its config alone and the device at hand, before anything is loaded."""

from __future__ import annotations

from typing import Any, Literal

import torch

from finetune.arch import MoeArch
from finetune.console import Report, gib
from finetune.memory import MemoryEstimate, estimate
from finetune.model import read_config, resolve_dtype
from finetune.recipe import Recipe

_DTYPES: dict[torch.dtype, Literal["bfloat16", "float16", "float32"]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


def preflight(recipe: Recipe, device: torch.device, *, device_bytes: int | None = None) -> MemoryEstimate:
    """Estimates the recipe on `device`.

    Args:
        device_bytes: memory of the device; asked of the GPU when not given, unknown on a CPU.

    Raises:
        ModelError: the model's config cannot be read or is no supported mixture of experts.
    """
    arch = MoeArch.from_config(read_config(recipe.model.path, recipe.model.revision), where=recipe.model.path)
    training: dict[str, Any] = recipe.training
    if device_bytes is None and device.type == "cuda" and torch.cuda.is_available():
        device_bytes = torch.cuda.mem_get_info(device)[1]
    return estimate(
        arch,
        method=recipe.trainable.method,
        lora_r=recipe.trainable.lora.r,
        lora_targets=recipe.trainable.lora.target_modules,
        use_dora=recipe.trainable.lora.use_dora,
        router=recipe.trainable.router,
        attention_storage=recipe.quantization.attention,
        # The defaults are TRL's.
        optimizer=training.get("optim", "adamw_torch_fused"),
        micro_batch=training.get("per_device_train_batch_size", 8),
        seq_len=training.get("max_length") or 1024,
        gradient_checkpointing=training.get("gradient_checkpointing", True),
        dtype=_DTYPES[resolve_dtype(recipe.model.dtype, device)],
        device="cuda" if device.type == "cuda" else "cpu",
        device_bytes=device_bytes,
    )


def show_memory(memory: MemoryEstimate, report: Report) -> None:
    """The preflight table, and what to change when it does not fit."""
    rows = [(item.name, gib(item.bytes), item.detail) for item in memory.items]
    size = "" if memory.device_bytes is None else f"of {gib(memory.device_bytes)} on the device"
    title = f"Preflight: memory of {memory.micro_batch} x {memory.seq_len} tokens"
    report.table(title, ("what", "size", "how"), [*rows, ("total", gib(memory.total_bytes), size)])
    if memory.largest_micro_batch is not None:
        report.line(f"largest micro-batch that fits: {memory.largest_micro_batch}")
    for line in memory.advice:
        report.line(f"to make it fit: {line}")
