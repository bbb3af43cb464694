"""What a run has to say at its end: tables, figures, and the summary that `--json` prints."""

from __future__ import annotations

import json
from typing import Any

import torch

from finetune.console import Report, gib
from finetune.quant import Census
from finetune.routing import RouterCallback, layer_metrics
from finetune.routing.plots import run_figures
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
    metrics: dict[str, float],
    stopped_by: str | None = None,
) -> dict[str, Any]:
    """Draws the figures and collects what a run has to say."""
    figures = [str(path) for path in run_figures(run, run.figures)] if draw else []
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "output": str(run.root),
        "adapter": str(run.adapter),
        "metrics": str(run.metrics),
        "figures": figures,
        "steps": steps,
        "stopped_by": stopped_by,
        "train_loss": metrics.get("train_loss"),
        "eval_loss_first": held_out[0] if held_out else None,
        "eval_loss_last": held_out[-1] if held_out else None,
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
    if summary["eval_loss_first"] is not None:
        change = f"{summary['eval_loss_first']:.3f} -> {summary['eval_loss_last']:.3f}"
        rows.append(("held-out completion loss (nats)", change))
    if summary["tokens_per_second"] is not None:
        rows.append(("tokens/s", f"{summary['tokens_per_second']:,.0f}"))
    if summary["peak_device_bytes"] is not None:
        rows.append(("peak device memory", gib(summary["peak_device_bytes"])))
    rows += [("adapter", summary["adapter"]), ("metrics", summary["metrics"])]
    rows += [("figure", figure) for figure in summary["figures"]]
    report.table("Done", ("what", "result"), rows)
