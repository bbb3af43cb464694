"""What a recipe needs of the device and of the disk, from its config and its rows alone, before weights are read."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import disable_progress_bars, enable_progress_bars
from transformers.trainer_utils import SaveStrategy

from finetune.console import Report, gib
from finetune.data import IGNORED, Reading, Source, Supervision, apply_template, encode_source
from finetune.errors import DeviceError, FinetuneError, ModelError
from finetune.kernels import choose_backend
from finetune.memory.activations import ActivationPlan, plan_activations
from finetune.memory.run import GIB, Dtype, Run, everything_supervised
from finetune.memory.step import recompute_seconds
from finetune.memory.totals import CUDA_CONTEXT, MemoryEstimate, estimate, total
from finetune.moe import MoeArch, load_tokenizer, read_config, resolve_dtype, saved_quantization, wants_fused_layers
from finetune.recipe import Recipe, bundled_shape

if TYPE_CHECKING:
    from trl import SFTConfig

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


# Tokenizer, scheduler and random states of one checkpoint or adapter; metrics and figures are less.
_SAMPLED_ROWS = 128
_BESIDE_WEIGHTS = 8 * 2**20


def preflight(recipe: Recipe, device: torch.device, *, device_bytes: int | None = None) -> MemoryEstimate:
    """Estimates the recipe on `device`, with the activation plan that it will train with.

    The plan may use what `memory.budget_gib` allows and what is free: of a GPU now, of a CPU's memory at all, because
    what other programs hold there comes and goes.

    Args:
        device_bytes: memory of the device; asked of the machine when not given.

    Raises:
        ModelError: the model's config cannot be read or is no supported mixture of experts.
        DeviceError: the experts' backend does not run on this GPU.
    """
    config, bundled = _config_of(recipe)
    arch = MoeArch.from_config(config, where=recipe.model.path)
    if device_bytes is None and device.type == "cuda" and torch.cuda.is_available():
        device_bytes = _usable_bytes(device)
    elif device_bytes is None and device.type == "cpu":
        device_bytes = _host_bytes()
    budget, usable = recipe.memory.budget_gib, device_bytes
    if budget is not None:
        usable = min(int(budget * GIB), usable or int(budget * GIB))
    # A folder that is quantized already knows how.
    experts = saved_quantization(config).get("experts", recipe.quantization.experts)
    run = replace(_run(recipe, arch, device), experts_storage=experts)
    checkpointing = recipe.training["gradient_checkpointing"]
    if checkpointing == "auto" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        checkpointing = "full"  # what a shard needs is not estimated
    none = replace(run, keep_attention=arch.layers, keep_gate_up=arch.layers)
    least = none if checkpointing == "none" else run
    if recipe.model.experts_backend == "auto" and usable is not None and total(least) > usable:
        least = replace(least, backend="loop")  # needs less
    planned = least if checkpointing != "auto" else none if usable is None else _planned(least, usable)
    memory = estimate(planned, device_bytes=usable, least=least)
    if not memory.fits and budget is not None and (device_bytes is None or memory.total_bytes <= device_bytes):
        enough = math.ceil(10 * memory.total_bytes / GIB) / 10
        memory = replace(memory, advice=(f"set memory.budget_gib: {enough} or more", *memory.advice))
    return replace(memory, bundled_shape=bundled)


def _config_of(recipe: Recipe) -> tuple[dict[str, Any], bool]:
    """The model's config, and whether it is the bundled one because the hub did not give it."""
    try:
        return read_config(recipe.model.path, recipe.model.revision), False
    except ModelError:
        shape = bundled_shape(recipe.model.path)
        if shape is None:
            raise
        return read_config(str(shape)), True


def plan_of(memory: MemoryEstimate) -> ActivationPlan:
    """The plan that the estimate counts with."""
    return ActivationPlan.last(memory.layers, attention=memory.keep_attention, gate_up=memory.keep_gate_up)


def _planned(run: Run, usable: int) -> Run:
    """The run with the plan that saves most time among those that fit; full checkpointing when none does."""

    def with_plan(plan: ActivationPlan) -> Run:
        return replace(run, keep_attention=plan.attention_layers, keep_gate_up=plan.gate_up_layers)

    attention_cost, gate_up_cost = recompute_seconds(run)
    plan = plan_activations(
        run.arch.layers,
        lambda plan: total(with_plan(plan)) <= usable,
        attention_cost=attention_cost,
        gate_up_cost=gate_up_cost,
    )
    planned = with_plan(plan)
    # What room is left after every activation is kept goes to the attention's weights: 2.5 GiB save 2.5 ms of a step,
    # a layer's gate_up output of 0.9 GiB saves about 6 (H100, Mixtral 8x7B, 8 x 1024 tokens).
    resident = replace(planned, resident_attention=run.can_be_resident)
    keeps_all = plan == ActivationPlan.none(run.arch.layers)
    return resident if keeps_all and total(resident) <= usable else planned


def _run(recipe: Recipe, arch: MoeArch, device: torch.device) -> Run:
    """The recipe as the estimate sees it, with full checkpointing; the defaults are TRL's."""
    training: dict[str, Any] = recipe.training
    lora, dtype = recipe.trainable.lora, resolve_dtype(recipe.model.dtype, device)
    micro_batch, seq_len = training.get("per_device_train_batch_size", 8), training.get("max_length") or 1024
    return Run(
        arch,
        method=recipe.trainable.method,
        lora_r=lora.r,
        lora_alpha=lora.alpha,
        lora_targets=lora.target_modules,
        lora_dropout=lora.dropout > 0,
        use_dora=lora.use_dora,
        router=recipe.trainable.router,
        auxiliary=recipe.router.aux == "train",
        attention_storage=recipe.quantization.attention,
        optimizer=training.get("optim", "adamw_torch_fused"),
        micro_batch=micro_batch,
        seq_len=seq_len,
        supervised=_supervised_share(recipe, max_length=training.get("max_length")),
        accumulation=training.get("gradient_accumulation_steps", 1),
        dtype=_DTYPES[dtype],
        backend=choose_backend(
            recipe.model.experts_backend,
            device,
            dtype,
            rows=micro_batch * seq_len * arch.top_k,
            experts=arch.experts,
            weights=2 * arch.intermediate * arch.hidden,
        ),
        fused_layers=wants_fused_layers(recipe.model.fused_layers, device, arch.model_type),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        device="cuda" if device.type == "cuda" else "cpu",
    )


def _supervised_share(recipe: Recipe, *, max_length: int | None) -> Callable[[int], float]:
    """The largest share of supervised tokens in a micro-batch of so many tokens, from the first rows of a local file;
    else all of them.

    The logits of a small model are most of what its step needs: 33 of 117 MiB for tiny-mixtral.
    """
    if not Path(recipe.data.train).is_file():
        return everything_supervised
    disable_progress_bars()
    try:
        tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
        apply_template(tokenizer, recipe.data.template)
        data = recipe.data
        source = Source(data.train, data.train_split, min(_SAMPLED_ROWS, data.max_rows or _SAMPLED_ROWS))
        reading = Reading(source, data.format, dict(data.columns), dict(data.roles))
        supervision = Supervision(data.loss_on, max_length, data.too_long)
        rows = encode_source(reading, tokenizer, supervision).dataset["labels"]
    except FinetuneError:  # `finetune train` says it where it matters
        return everything_supervised
    finally:
        enable_progress_bars()
    supervised = [label != IGNORED for labels in rows for label in labels]

    def largest_share(tokens: int) -> float:
        batches = (supervised[begin : begin + tokens] for begin in range(0, len(supervised) - tokens + 1, tokens))
        return max((sum(batch) / tokens for batch in batches), default=1.0) or 1.0

    return cache(largest_share)


def _usable_bytes(device: torch.device) -> int:
    """What this process may use of a GPU: what is free, what it holds already, and its context, which it has by now."""
    free, whole = torch.cuda.mem_get_info(device)
    return min(whole, free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT)


def _host_bytes() -> int:
    """What one process may use of this machine's memory at most: its share of it, or of its control group's limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # none on other systems; "max" where there is no limit
            found.append(int(limit.read_text(encoding="utf-8")))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_fits(memory: MemoryEstimate, *, where: str) -> None:
    """Refuses a run that needs more than it may use. What a shard (FSDP) needs is not estimated.

    Raises:
        DeviceError: says both numbers, and what would fit.
    """
    if memory.fits or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    assert memory.device_bytes is not None, "what is not known fits"
    raise DeviceError(
        f"the run does not fit: it needs {gib(memory.total_bytes)} and may use {gib(memory.device_bytes)}",
        where=where,
        allowed=f"micro-batches of at most {memory.largest_micro_batch}" if memory.largest_micro_batch else None,
        fix="; or ".join((_what_fits(memory), *memory.advice, "try it all the same with --force")),
    )


def _what_fits(memory: MemoryEstimate) -> str:
    return f"what fits here: {memory.what_fits}" if memory.overrides else memory.what_fits


def show_memory(memory: MemoryEstimate, report: Report) -> None:
    """The preflight table, the activation plan, and what to change when it does not fit."""
    rows = [(item.name, gib(item.bytes), item.detail) for item in memory.items]
    size = "" if memory.device_bytes is None else f"of {gib(memory.device_bytes)} that it may use"
    title = f"Preflight: memory of {memory.micro_batch} x {memory.seq_len} tokens"
    report.table(title, ("what", "size", "how"), [*rows, ("total", gib(memory.total_bytes), size)])
    if memory.bundled_shape:
        report.line("the hub did not give the model's config.json; counted with the one that comes with the toolkit")
    report.line(f"activations: {plan_of(memory)}")
    if memory.largest_micro_batch is not None:
        report.line(f"largest micro-batch that fits: {memory.largest_micro_batch}")
    if memory.device_bytes is not None and not memory.fits:
        report.line(f"does not fit: {gib(memory.total_bytes)} of {gib(memory.device_bytes)} that it may use")
    for line in memory.advice:
        report.line(f"to make it fit: {line}")
    if memory.what_fits:
        report.line(_what_fits(memory))


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
