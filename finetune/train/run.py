"""The story of a run, top to bottom: recipe, preflight, data, model, census, what trains, trainer, what is saved and
pushed.

Three parts: `prepare` up to the first step, `run_steps`, and what `train` saves; the bench shares the first two.
Everything that can be refused is refused before the weights are read; nothing is written before the output folder is
claimed. TRL's trainer does the training; where a 4-bit MoE needs it to differ stands in trainer.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PrinterCallback, TrainerCallback

from finetune.adapter import (
    FusedLoraLinear4bit,
    add_attention_lora,
    keep_fp32_masters,
    trainable_count,
    unfreeze_non_moe,
)
from finetune.checkpoint import find_checkpoints, read_json
from finetune.console import Report
from finetune.data import apply_template, prepare_data, require_sound, show_short
from finetune.data import document as describe_data
from finetune.disk import folder_bytes, require_space, staged, write_json, write_text
from finetune.errors import DeviceError, OutputError
from finetune.export import Hub, destination_of, push_after_training, require_writable, write_adapter_card
from finetune.jsonl import JsonlCallback
from finetune.memory import MemoryEstimate, apply_plan, disk_bytes, plan_of, preflight, require_fits, show_memory
from finetune.moe import (
    VARLEN,
    BaseSpec,
    Census,
    FullRows,
    LoadedModel,
    MoeArch,
    QuantizedExperts,
    check_base,
    hash_experts,
    load_base,
    load_tokenizer_of,
    require_quantized_experts,
    require_same_experts,
    resolve_device,
    take_census,
)
from finetune.private_api import attention_of
from finetune.recipe import Recipe, provenance, resolved_yaml
from finetune.router import AuxiliaryLoss, RouterCallback, watch_router
from finetune.runfolder import RunFolder, claimed, require_claimable, restore
from finetune.signals import Signals
from finetune.train.loggers import logger_callbacks, loggers_in_use, require_loggers
from finetune.train.progress import ProgressCallback
from finetune.train.settings import refusals_explained, training_arguments
from finetune.train.stopping import Stopping
from finetune.train.summary import show_census, show_router, show_summary, summarize
from finetune.train.trainer import MoeTrainer


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: the trainer, and what watches and describes it."""

    trainer: MoeTrainer
    run: RunFolder
    checkpoint: Path | None
    memory: MemoryEstimate
    census: Census
    arch: MoeArch
    progress: ProgressCallback
    router: RouterCallback
    stopping: Stopping


class RunEnded(Exception):
    """The run to be resumed has come to its end, and everything is saved."""

    def __init__(self, summary: dict[str, Any]):
        super().__init__("the run has ended")
        self.summary = summary


def train(
    recipe: Recipe,
    report: Report,
    *,
    resume: bool = False,
    overwrite: bool = False,
    random_weights: bool = False,
    force: bool = False,
    goes_on: str | None = None,
) -> dict[str, Any]:
    """Runs a recipe; returns the summary that `--json` prints. Arguments and errors are those of `prepare`.

    Args:
        goes_on: the command that resumes the run.

    Raises:
        Interrupted: SIGTERM or SIGINT; what was trained is in a checkpoint.
        FinetuneError: also where the loss or its gradient was not finite for several steps.
    """
    with Signals() as signals:
        try:
            ready = prepare(
                recipe,
                report,
                resume=resume,
                overwrite=overwrite,
                random_weights=random_weights,
                force=force,
                signals=signals,
            )
        except RunEnded as ended:
            return ended.summary
        signals.goes_on = goes_on
        with signals.steps():
            metrics = run_steps(ready, recipe)
        if ready.stopping.stopped:
            PartialState().wait_for_everyone()  # the main process has saved
            ready.stopping.explain(step=ready.trainer.state.global_step, goes_on=goes_on)
            return {}
        summary = _save(ready, recipe, report, metrics)
        signals.goes_on = None

        # Push: from the main process, when the others have nothing to wait for.
        if summary and recipe.output.push_to_hub is not None and not random_weights:
            if ready.router.stopped_by is None:
                summary |= {"pushed": push_after_training(recipe, report)}
            else:
                folder = ready.run.root
                report.line(f"Not pushed, because an alarm stopped the run; to push it anyway: finetune push {folder}")
    return summary


def _save(ready: Prepared, recipe: Recipe, report: Report, metrics: dict[str, float]) -> dict[str, Any]:
    """Writes what was trained and sums up; the summary is the main process's, and empty in the others."""
    summary: dict[str, Any] = {}
    trainer, run = ready.trainer, ready.run
    tuned = trainer.tuned_tensors()
    if trainer.is_world_process_zero():
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        saved_step = best or trainer.state.global_step
        with staged(run.adapter, replace=True) as folder:
            trainer.save_tuned(folder, tuned)
        summary = summarize(
            run,
            ready.census,
            draw=recipe.router.figures,
            steps=trainer.state.global_step,
            steps_skipped=ready.stopping.skipped,
            last_not_finite=ready.stopping.last_not_finite,
            saved_step=saved_step,
            trainable_parameters=trainable_count(trainer.model),
            tokens_per_second=ready.progress.tokens_per_second,
            metrics=metrics,
            stopped_by=ready.router.stopped_by,
        )
        show_router(ready.router, report)
        show_summary(summary, report)
        write_json(run.root / "summary.json", summary)
        write_adapter_card(run)
    PartialState().wait_for_everyone()
    return summary


def prepare(
    recipe: Recipe,
    report: Report,
    *,
    resume: bool = False,
    overwrite: bool = False,
    random_weights: bool = False,
    force: bool = False,
    signals: Signals | None = None,
) -> Prepared:
    """Everything up to the first step; the output folder is claimed.

    Args:
        resume: continue from the last whole checkpoint of the same recipe's run.
        overwrite: replace a run that the output folder holds.
        random_weights: take only the shape from `model.path`, to measure speed and memory.
        force: go on where the estimate says that it does not fit.
        signals: what may stop the run between two steps.

    Raises:
        FinetuneError: whatever the user can mend, before the first step where possible.
        RunEnded: nothing is left to do; said to the user.
    """
    if resume and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # accelerate 1.15 cannot load a sharded model whose frozen weights are 4-bit.
        raise DeviceError(
            "a sharded run (FSDP) cannot be resumed",
            where="--resume",
            allowed="one process, or accelerate_configs/multi_gpu.yaml",
            fix="start it again; each of its checkpoint folders holds an adapter that can be merged",
        )
    require_loggers(recipe)
    device = resolve_device(recipe.model.device)
    args = training_arguments(recipe, device)
    main = PartialState().is_main_process
    settings = recipe.model_dump(mode="json")
    for line in restore(Path(recipe.output.dir)) if main else ():
        report.line(line)
    PartialState().wait_for_everyone()
    run = require_claimable(Path(recipe.output.dir), settings, resume=resume, overwrite=overwrite)
    checkpoint = None
    if resume:
        found = find_checkpoints(run.checkpoints, only_model=args.save_only_model, processes=args.world_size)
        checkpoint = found.newest
        if summary := _ended(run, checkpoint):
            if main:
                push = "" if recipe.output.push_to_hub is None else f"; to push it: finetune push {run.root}"
                report.line(
                    f"{run.root} ended after {summary['steps']} steps and everything is saved: nothing to do{push}"
                )
            raise RunEnded(summary)
    if main and recipe.output.push_to_hub is not None and not random_weights:
        require_writable(Hub(report), destination_of(recipe))

    # Preflight: from the config alone.
    base = BaseSpec(recipe.model.path, recipe.model.revision, recipe.quantization.attention)
    _, arch = check_base(base, recipe.model.attn_implementation, weights=not random_weights)
    memory = preflight(recipe, device)
    if main:
        show_memory(memory, report)
    if not force:
        require_fits(memory, where=f"memory of {device}")

    # Data: before the weights, because most mistakes are here.
    tokenizer = load_tokenizer_of(base, arch)
    template = apply_template(tokenizer, recipe.data.template)
    with args.main_process_first(desc="data"):
        rows = prepare_data(recipe, tokenizer)
    supervision = describe_data(recipe, rows, name=recipe.output.dir, template=template)
    if main:
        show_short(supervision, report)
    require_sound(supervision)
    needed = disk_bytes(memory, args, len(rows.train)) - folder_bytes(run.checkpoints)
    require_space(run.root, needed, what="the run's checkpoints and adapter")
    if main and resume:
        for line in found.passed:
            report.line(line)
        whence = "no checkpoint was written to its end: from the beginning" if checkpoint is None else checkpoint.name
        report.line(f"Resuming {run.root}: {whence}")

    # Model: quantized while loading, from the dtype that an interrupted run began with, then proven to be.
    if checkpoint is not None:
        begun = BaseSpec.read(checkpoint)
        base = replace(base, quantizing_dtype=begun.quantizing_dtype, experts_sha256=begun.experts_sha256)
    loaded = load_base(
        base,
        dtype=recipe.model.dtype,
        device=recipe.model.device,
        attn_implementation=recipe.model.attn_implementation,
        fused_layers=recipe.model.fused_layers,
        random_weights_seed=args.seed if random_weights else None,
    )
    apply_template(loaded.tokenizer, recipe.data.template)
    arch = loaded.arch
    census = take_census(loaded.model)
    if main:
        show_census(census, report)
    require_quantized_experts(census)
    if main:
        hashes = hash_experts(loaded.model)
        if base.experts_sha256:
            require_same_experts(base.experts_sha256, hashes, where=base.path)
        loaded = replace(loaded, base=replace(loaded.base, experts_sha256=hashes))

    # What trains.
    model = choose_trainable(loaded, recipe)
    if main:
        report.line(f"{trainable_count(model):,} of {arch.total_params:,} parameters train ({recipe.trainable.method})")

    auxiliary = choose_auxiliary(model, arch, recipe)
    if main and auxiliary is not None and not recipe.trainable.router:
        moved = "the attention" if recipe.trainable.method == "attention_lora" else "attention, norms and embeddings"
        report.line(
            f"router.aux: train only moves {moved}: the routers are frozen (trainable.router: true trains them)"
        )

    # What a step keeps for its backward pass, and how it multiplies the experts.
    apply_plan(model, arch, plan := plan_of(memory))
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            module.backend = memory.backend
        if memory.resident_attention and isinstance(module, FusedLoraLinear4bit):
            module.keep_dequantized(loaded.model.dtype)

    # The output folder: taken now, given back if TRL refuses.
    progress = ProgressCallback()
    stopping = Stopping(signals or Signals(), tell=progress.warn if main else lambda line: None, rows=rows.named)
    router = watch_router(
        model, arch, recipe, (rows.train, rows.held_out), run, loaded.tokenizer, tell=progress.warn, main=main
    )
    callbacks: list[TrainerCallback] = [
        *([router] if recipe.router.log else []),
        progress,  # adds tokens_per_second, which the files below record
        JsonlCallback(run.metrics, extra=[router.vectors]),
        *logger_callbacks(recipe, run, router.vectors),
        stopping,
    ]
    claim = claimed(run.root, settings, resume=resume, overwrite=overwrite) if main else contextlib.nullcontext()
    with claim:
        if main and not resume:
            write_json(run.run_file, {"recipe": settings, **provenance()})
            write_text(run.recipe, resolved_yaml(recipe))
            write_json(run.census, census.to_dict())
            write_json(run.data, supervision)
        with refusals_explained(), keep_fp32_masters(model):
            trainer = MoeTrainer(
                model=model,
                args=args,
                train_dataset=rows.train,
                eval_dataset=rows.held_out,
                processing_class=loaded.tokenizer,
                callbacks=callbacks,
            )

    trainer.base, trainer.plan, trainer.tokens_per_batch = loaded.base, plan, recipe.data.tokens_per_batch
    trainer.router_learning_rate, trainer.auxiliary = recipe.trainable.router_learning_rate, auxiliary
    trainer.stopping = stopping
    trainer.tell, trainer.uncounted = progress.warn, router.capture.paused
    if attention_of(loaded.model.config) == VARLEN:
        trainer.data_collator = FullRows(trainer.data_collator)
    # It prints every log to standard output, which belongs to reports.
    trainer.remove_callback(PrinterCallback)
    return Prepared(trainer, run, checkpoint, memory, census, arch, progress, router, stopping)


def _ended(run: RunFolder, checkpoint: Path | None) -> dict[str, Any] | None:
    """The summary of a run that has ended and saved everything; None where something is left to do.

    An alarm's stop is no end, nor is one whose last checkpoint has been lost since.
    """
    if not ((run.root / "summary.json").is_file() and run.adapter.is_dir()):
        return None
    summary = read_json(run.root / "summary.json", kind=OutputError)
    lost = checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) < summary["steps"]
    return None if lost or summary["stopped_by"] is not None else summary


def run_steps(ready: Prepared, recipe: Recipe) -> dict[str, float]:
    """Trains; returns the trainer's metrics."""
    resumed = None if ready.checkpoint is None else str(ready.checkpoint)
    with ready.progress, out_of_memory_explained(recipe), loggers_in_use(recipe):
        return ready.trainer.train(resume_from_checkpoint=resumed).metrics


def choose_trainable(loaded: LoadedModel, recipe: Recipe) -> Any:
    """Adds LoRA to the attention or unfreezes everything but the experts, and the routers, by the recipe."""
    if recipe.trainable.method == "attention_lora":
        # The adapter's initial values are drawn here.
        torch.manual_seed(recipe.training.get("seed", 42))
        lora = recipe.trainable.lora.model_dump()
        return add_attention_lora(loaded.model, loaded.arch, **lora, router=recipe.trainable.router)
    unfreeze_non_moe(loaded.model, loaded.arch, router=recipe.trainable.router)
    return loaded.model


def choose_auxiliary(model: Any, arch: MoeArch, recipe: Recipe) -> AuxiliaryLoss | None:
    """The routers' auxiliary losses, where the recipe trains on them."""
    if recipe.router.aux != "train":
        return None
    coefficients = {"balance_coef": recipe.router.balance_coef, "z_coef": recipe.router.z_coef}
    return AuxiliaryLoss(model, num_experts=arch.experts, top_k=arch.top_k, **coefficients)


class out_of_memory_explained:
    """Turns the device's out-of-memory error into one that says what to change."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise DeviceError(
                "the GPU ran out of memory: " + str(error).split(". GPU")[0].splitlines()[0],
                where="training step",
                fix="set training.gradient_checkpointing=auto and a memory.budget_gib below what is free; or lower "
                "training.per_device_train_batch_size (and raise gradient_accumulation_steps) or training.max_length",
            ) from error
