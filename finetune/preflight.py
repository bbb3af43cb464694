"""What a recipe needs of the device and of the disk, from its config and its rows alone, before weights are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.trainer_utils import SaveStrategy

from finetune.arch import MoeArch
from finetune.console import Report, gib
from finetune.memory import MemoryEstimate, estimate
from finetune.model import read_config, resolve_dtype
from finetune.recipe import Recipe

if TYPE_CHECKING:
    from trl import SFTConfig

_DTYPES: dict[torch.dtype, Literal["bfloat16", "float16", "float32"]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


# Tokenizer, scheduler and random states of one checkpoint or adapter; metrics and figures are less.
_BESIDE_WEIGHTS = 8 * 2**20


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
    if memory.device_bytes is not None and not memory.fits:
        report.line(f"does not fit: {gib(memory.total_bytes)} on a device of {gib(memory.device_bytes)}")
    for line in memory.advice:
        report.line(f"to make it fit: {line}")


def disk_bytes(memory: MemoryEstimate, args: SFTConfig, rows: int) -> int:
    """What a run over `rows` examples writes at most at one time: checkpoints and what was trained."""
    checkpoint = memory.trained_bytes if args.save_only_model else memory.checkpoint_bytes
    tuned = memory.trained_bytes + _BESIDE_WEIGHTS
    return _checkpoints(args, rows) * (checkpoint + _BESIDE_WEIGHTS) + tuned


def _checkpoints(args: SFTConfig, rows: int) -> int:
    """How many lie on the disk at most; one more than the limit, since the oldest goes when the newest is whole."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epoch = math.ceil(rows / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if args.save_strategy == SaveStrategy.NO:
        return 0
    every: float = epoch
    if args.save_strategy == SaveStrategy.STEPS:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    elif args.save_strategy == SaveStrategy.BEST and args.eval_steps:
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * steps)
    limit = math.inf if args.save_total_limit is None else args.save_total_limit + 1
    return int(min(math.ceil(steps / every), limit))
