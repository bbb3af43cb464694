"""`python -m bench router`: what watching the routers costs a training step, in time and memory.

The trainer of a recipe makes the batches; then the bare step runs over them with the capture on and off in turns, so
that clocks and temperature are the same for both. What a log costs (reading the sums, the formulas) is measured apart,
because it comes once in `logging_steps`.

Leaves out: the comparison with the base at evaluations, which is a forward pass over the probe.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.bench.measure import BareStep, Recorder, now, read_peak, reset_peak
from finetune.bench.result import conditions, rounded
from finetune.bench.workload import make_workload
from finetune.console import Report
from finetune.router.capture import RouterCapture
from finetune.router.metrics import layer_metrics
from finetune.router.names import brief_scalars, layer_scalars, layer_vectors, part_scalars
from finetune.train.run import prepare, run_steps

_READINGS = 5


def bench_router(
    path: Path,
    report: Report,
    *,
    overrides: Sequence[str] = (),
    batch: int | None = None,
    length: int | None = None,
    steps: int = 3,
    rounds: int = 8,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Measures a recipe with the capture on and off and prints the table; returns the JSON line's content.

    Args:
        batch, length: micro-batch and row length; the recipe's when None.
        steps: measured steps of a turn.
        rounds: turns of each kind.
        random_weights: only the shape of `model.path`, without a checkpoint.

    Raises:
        FinetuneError: whatever `finetune train` would refuse; see `make_workload`.
    """
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
        ready = prepare(workload.recipe, Report(as_json=True), random_weights=random_weights)
        recorder = Recorder()
        recorder.attach(ready.trainer.model)
        run_steps(ready, workload.recipe)
        recorder.detach()
    step = BareStep(ready.trainer, recorder.calls)
    device, arch = step.device, ready.arch
    capture = RouterCapture(ready.router.capture.model, num_experts=arch.experts, top_k=arch.top_k)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, int] = {}
    step.measure(1)
    for _ in range(rounds):
        for on in (True, False):
            if on:
                capture.attach()
            reset_peak(device)
            step(0)  # the allocator's cache grows again
            begun = now(device)
            for index in range(steps):
                step(index)
            seconds[on].append((now(device) - begun) / steps)
            peak = read_peak(device)
            peaks[on] = max(peaks.get(on, 0), 0 if peak is None else peak.allocated)
            capture.detach()
    differences = [on - off for on, off in zip(seconds[True], seconds[False], strict=True)]
    off = statistics.mean(seconds[False])
    document = {
        "bench": "router",
        "recipe": str(path),
        "overrides": list(overrides),
        "random_weights": random_weights,
        "batch": workload.batch,
        "length": workload.length,
        "steps": steps,
        "rounds": rounds,
        "seconds_per_step_off": rounded(off),
        "capture_ms": rounded(1e3 * statistics.mean(differences)),
        "capture_ms_standard_error": rounded(1e3 * statistics.stdev(differences) / rounds**0.5),
        "capture_share": rounded(statistics.mean(differences) / off),
        "capture_peak_bytes": peaks[True] - peaks[False],
        "log_ms": rounded(1e3 * _reading(capture)),
        **conditions(device),
    }
    _show(document, report)
    return document


def _reading(capture: RouterCapture) -> float:
    """Seconds that one log takes on the host: the fastest of a few, the sums being ready."""
    capture.attach()
    taken = []
    for _ in range(_READINGS):
        begun = time.perf_counter()
        parts = capture.snapshot_parts("train")
        sums = parts["prompt"] + parts["completion"]
        layers = layer_metrics(sums)
        brief_scalars(layers, tokens=sums.tokens), part_scalars(parts), layer_scalars(layers), layer_vectors(layers)
        taken.append(time.perf_counter() - begun)
    capture.detach()
    return min(taken)


def _show(document: dict[str, Any], report: Report) -> None:
    rows = [
        ("step without it", f"{1e3 * document['seconds_per_step_off']:.1f} ms"),
        ("capture", f"{document['capture_ms']:+.2f} ms (standard error {document['capture_ms_standard_error']:.2f})"),
        ("of the step", f"{document['capture_share']:+.2%}"),
        ("peak memory", f"{document['capture_peak_bytes'] / 2**20:+.1f} MiB"),
        ("one log", f"{document['log_ms']:.1f} ms"),
    ]
    size = f"{document['batch']} x {document['length']} tokens, {document['device']}"
    report.table(f"Watching the routers: {size}", ("what", "cost"), rows)
