"""What a run has to say at its end: tables, figures, and the summary that `--json` prints."""

from __future__ import annotations

from typing import Any

import torch

from finetune.console import Report, gib
from finetune.jsonl import read_metrics
from finetune.moe import Census
from finetune.router import RouterCallback, layer_metrics, run_figures
from finetune.run_files import held_out_loss
from finetune.runfolder import RunFolder


def show_census(census: Census, report: Report) -> None:
    rows = [(f"{row.role} ({row.tensors})", row.dtype, gib(row.bytes)) for row in census.rows]
    report.table("Byte census", ("role (tensors)", "dtype", "size"), [*rows, ("total", "", gib(census.total_bytes))])


def show_router(router: RouterCallback, report: Report) -> None:
    if "train" not in router.totals:
        return
    rows = [
        (
            f"{index}",
            f"{layer.max_vio:.3f}",
            f"{layer.min_utilization:.2f}",
            f"{layer.max_utilization:.2f}",
            f"{layer.load_entropy:.3f}",
            f"{layer.balance_loss:.3f}",
        )
        for index, layer in enumerate(layer_metrics(router.totals["train"]))
    ]
    columns = ("layer", "MaxVio", "min util.", "max util.", "entropy", "balance")
    report.table("Router over the training tokens (1.0 is an even share)", columns, rows)


def summarize(
    run: RunFolder,
    census: Census,
    *,
    draw: bool,
    steps: int,
    trainable_parameters: int,
    tokens_per_second: float | None,
    steps_skipped: int,
    last_not_finite: int,
    metrics: dict[str, float],
    saved_step: int,
    stopped_by: str | None = None,
) -> dict[str, Any]:
    """Draws the figures and collects what a run has to say.

    Args:
        steps_skipped: whose update was not applied.
        last_not_finite: how many of the last ones, in a row, had a loss or gradient that is not finite.
        saved_step: whose weights the adapter has; not the last one where the best is loaded at the end.
    """
    figures = [str(path) for path in run_figures(run, run.figures)] if draw else []
    lines = read_metrics(run.metrics)
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    logged = [line["loss"] for line in lines if line.get("loss") is not None]
    evaluated = max((step for step in held_out if 0 < step <= saved_step), default=None)
    return {
        "output": str(run.root),
        "adapter": str(run.adapter),
        "metrics": str(run.metrics),
        "figures": figures,
        "steps": steps,
        "steps_skipped": steps_skipped,
        "last_steps_not_finite": last_not_finite,
        "stopped_by": stopped_by,
        "train_loss": metrics.get("train_loss"),
        "train_loss_first": logged[0] if logged else None,  # means of the first and the last logged steps
        "train_loss_last": logged[-1] if logged else None,
        "eval_loss_first": held_out.get(0),  # of the model before its first step
        "eval_loss_last": None if evaluated is None else held_out[evaluated],
        "eval_step_last": evaluated,
        "tokens_per_second": tokens_per_second,
        "train_seconds": metrics.get("train_runtime"),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "trainable_parameters": trainable_parameters,
        "census_bytes": census.total_bytes,
    }


def show_summary(summary: dict[str, Any], report: Report) -> None:
    rows = [("steps", f"{summary['steps']}")]
    if summary["stopped_by"] is not None:
        rows.append(("stopped by an alarm", summary["stopped_by"]))
    if summary["steps_skipped"]:
        rows.append(("steps skipped (NaN or infinite)", f"{summary['steps_skipped']}"))
    if summary["train_loss"] is not None:
        first, last = summary["train_loss_first"], summary["train_loss_last"]
        ends = "" if first is None else f"; first logged {first:.3f}, last {last:.3f}"
        rows.append(("training loss (nats)", f"{summary['train_loss']:.3f} over the run{ends}"))
    if (held_out := held_out_loss(summary)) is not None:
        rows.append(("held-out completion loss (nats)", held_out))
    if summary["tokens_per_second"] is not None:
        rows.append(("tokens/s", f"{summary['tokens_per_second']:,.0f}"))
    if summary["peak_device_bytes"] is not None:
        rows.append(("peak device memory", gib(summary["peak_device_bytes"])))
    rows += [("adapter", summary["adapter"]), ("metrics", summary["metrics"])]
    rows += [("figure", figure) for figure in summary["figures"]]
    report.table("Done", ("what", "result"), rows)
    if last := summary["last_steps_not_finite"]:
        steps = f"{last} steps" if last > 1 else "step"
        report.line(
            f"warning: the loss or gradient of the last {steps} was NaN or infinite. Such a gradient is not applied: "
            "the adapter holds finite weights. Look at the rows named above and at training.learning_rate before you "
            "use it"
        )
