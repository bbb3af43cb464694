"""`finetune bench train`: how fast a recipe trains through the trainer, and what the difference to the device is.

One run measures, in this order: the trainer of `finetune train` with its data, callbacks and logging; the bare step on
the batches that the trainer had; its kernels; and the device's own rates. So the four are comparable: same process,
same weights, same temperature.

Leaves out: several processes, evaluation, saving.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.bench.families import TimeSplit, profile_kernels, split_time
from finetune.bench.measure import BareStep, Peak, Recorder, Speed, Window, read_peak, real_tokens, reset_peak
from finetune.bench.result import conditions, rounded
from finetune.bench.roofline import Rates, measure_rates, roofline_tokens_per_second, training_flops
from finetune.bench.workload import WARM_UP, Workload, make_workload
from finetune.console import Report, gib
from finetune.memory import MemoryEstimate
from finetune.moe import GATE_UP_PROJ, MoeArch, QuantizedExperts
from finetune.train import Prepared, prepare, run_steps

_PROFILED_STEPS = 2


def bench_train(
    path: Path,
    report: Report,
    *,
    overrides: Sequence[str] = (),
    batch: int | None = None,
    length: int | None = None,
    steps: int = 8,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Measures a recipe and prints the tables; returns the JSON line's content.

    Args:
        batch, length: micro-batch and row length; the recipe's when None.
        steps: measured steps, after three of warm-up.
        random_weights: only the shape of `model.path`, without a checkpoint.

    Raises:
        FinetuneError: whatever `finetune train` would refuse; see `make_workload`.
    """
    # The run's own tables tell how it goes and are no result.
    progress = Report(as_json=True)
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        workload = make_workload(
            path,
            overrides,
            scratch=Path(scratch),
            batch=batch,
            length=length,
            steps=steps,
            random_weights=random_weights,
        )
        # Whether it fits is among what is measured.
        ready = prepare(workload.recipe, progress, random_weights=random_weights, force=True)
        trained, peak, recorder = _train(ready, workload)
    bare_step = BareStep(ready.trainer, recorder.calls)
    bare = bare_step.measure(steps)
    device = ready.trainer.accelerator.device
    tokens = bare.tokens // steps
    full_weights = workload.recipe.trainable.method == "non_moe"
    flops = training_flops(ready.arch, full_weights=full_weights)
    split = rates = ceiling = None
    if device.type == "cuda":
        split = _split(bare_step, bare.seconds / steps, ready.arch)
        rates = _rates(ready, tokens)
        ceiling = roofline_tokens_per_second(
            ready.arch, tokens, flops_per_token=flops, gemm_rate=rates.gemm, copy_rate=rates.copy
        )
    document = {
        "bench": "train",
        "recipe": str(path),
        "overrides": list(overrides),
        "random_weights": random_weights,
        "model_type": ready.arch.model_type,
        "parameters": ready.arch.total_params,
        "method": workload.recipe.trainable.method,
        "batch": workload.batch,
        "length": workload.length,
        "warm_up": WARM_UP,
        "steps": steps,
        "tokens_per_step": tokens,
        "trainer": _speed(trained, steps, flops),
        "bare": _speed(bare, steps, flops),
        "trainer_over_bare": rounded(trained.tokens_per_second / bare.tokens_per_second),
        "model_flops_per_token": flops,
        "roofline_tokens_per_second": rounded(ceiling),
        "trainer_over_roofline": None if ceiling is None else rounded(trained.tokens_per_second / ceiling),
        "rates": None if rates is None else rates.to_dict(),
        "memory": _memory(ready.memory, peak),
        "activations": {
            "layers": ready.memory.layers,
            "keep_attention": ready.memory.keep_attention,
            "keep_gate_up": ready.memory.keep_gate_up,
            "resident_attention": ready.memory.resident_attention,
        },
        "experts_backend": ready.memory.backend,
        "census_bytes": ready.census.total_bytes,
        "families": None if split is None else split.to_dict(),
        **conditions(device),
    }
    _show(document, split, report)
    return document


def _train(ready: Prepared, workload: Workload) -> tuple[Speed, Peak | None, Recorder]:
    """The trainer's measured steps, the peak over all of its steps, and what its model was called with."""
    device = ready.trainer.accelerator.device
    window, recorder = Window(WARM_UP, WARM_UP + workload.steps, device), Recorder()
    ready.trainer.add_callback(window)
    recorder.attach(ready.trainer.model)
    reset_peak(device)
    run_steps(ready, workload.recipe)
    peak = read_peak(device)
    recorder.detach()
    assert len(recorder.calls) == workload.all_steps, "one micro-batch a step"
    measured = recorder.calls[WARM_UP : WARM_UP + workload.steps]
    losses = [float(loss) for loss in recorder.losses]
    return Speed(window.seconds, sum(map(real_tokens, measured)), losses), peak, recorder


def _split(bare_step: BareStep, seconds_per_step: float, arch: MoeArch) -> TimeSplit:
    def work() -> None:
        for index in range(_PROFILED_STEPS):
            bare_step(index)

    return split_time(
        profile_kernels(work),
        steps=_PROFILED_STEPS,
        seconds_per_step=seconds_per_step,
        intermediate=arch.intermediate,
        vocab=arch.vocab,
    )


def _rates(ready: Prepared, tokens: int) -> Rates:
    """The device's rates in the dtype in which the run multiplies."""
    trainer = ready.trainer
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    torch.cuda.empty_cache()
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else model.dtype
    return measure_rates(ready.arch, tokens, experts.packed(GATE_UP_PROJ), dtype)


def _speed(speed: Speed, steps: int, flops: int) -> dict[str, Any]:
    return {
        "tokens_per_second": rounded(speed.tokens_per_second),
        "seconds_per_step": rounded(speed.seconds / steps),
        "tflops": rounded(speed.tokens_per_second * flops / 1e12),
        "losses": [round(loss, 5) for loss in speed.losses],
    }


def _memory(estimate: MemoryEstimate, peak: Peak | None) -> dict[str, Any]:
    """Measured beside estimated. The peak of tensors holds neither the context nor the margin of the estimate."""
    tensors = estimate.tensor_bytes
    return {
        "peak": None if peak is None else asdict(peak),
        "estimate_bytes": estimate.total_bytes,
        "estimate_of_tensors_bytes": tensors,
        "estimate_error_percent": None if peak is None else rounded(100 * (tensors / peak.allocated - 1)),
        "items": {item.name: item.bytes for item in estimate.items},
    }


def _show(document: dict[str, Any], split: TimeSplit | None, report: Report) -> None:
    size = f"{document['batch']} x {document['length']} tokens, {document['steps']} steps, {document['device']}"
    rows = []
    for name in ("trainer", "bare"):
        speed = document[name]
        tokens_per_second = speed["tokens_per_second"]
        rows.append((name, f"{tokens_per_second:,.0f}", f"{speed['seconds_per_step']:.3f}", f"{speed['tflops']:.2f}"))
    if document["roofline_tokens_per_second"] is not None:
        ceiling = document["roofline_tokens_per_second"]
        tflops = ceiling * document["model_flops_per_token"] / 1e12
        rows.append(("roofline", f"{ceiling:,.0f}", f"{document['tokens_per_step'] / ceiling:.3f}", f"{tflops:.2f}"))
    report.table(f"Training: {size}", ("path", "tokens/s", "s/step", "model TFLOP/s"), rows)
    notes = [("trainer / bare", f"{document['trainer_over_bare']:.1%}")]
    memory, rates = document["memory"], document["rates"]
    if document["trainer_over_roofline"] is not None:
        notes.append(("trainer / roofline", f"{document['trainer_over_roofline']:.1%}"))
    if memory["peak"] is not None:
        notes.append(("peak allocated", gib(memory["peak"]["allocated"])))
        notes.append(("peak reserved", gib(memory["peak"]["reserved"])))
        estimated = f"{gib(memory['estimate_of_tensors_bytes'])} ({memory['estimate_error_percent']:+.1f}%)"
        notes.append(("estimated for tensors", estimated))
    notes.append(("estimated with context and margin", gib(memory["estimate_bytes"])))
    kept, layers = document["activations"], document["activations"]["layers"]
    notes.append(
        ("layers that keep gate_up, attention", f"{kept['keep_gate_up']}, {kept['keep_attention']} of {layers}")
    )
    notes.append(("experts' products", document["experts_backend"]))
    if rates is not None:
        notes.append(("copy rate", f"{rates['copy'] / 1e12:.2f} TB/s"))
        notes.append(("GEMM " + " x ".join(map(str, rates["gemm_shape"])), f"{rates['gemm'] / 1e12:.0f} TFLOP/s"))
        notes.append(("NF4 dequantization", f"{rates['dequantize'] / 1e12:.2f} TB/s"))
    notes.append(
        ("loss, first to last", f"{document['trainer']['losses'][0]:.3f} to {document['trainer']['losses'][-1]:.3f}")
    )
    report.table("Beside it", ("what", "value"), notes)
    if split is not None:
        report.table("A bare step by kernel family", ("family", "ms", "share", "launches"), split.rows())
