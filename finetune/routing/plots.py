"""Figures of a run: the load of every expert, and loss beside router imbalance over the steps.

How: drawn from numbers alone (a load matrix, or the metrics file that the run left), with matplotlib's object
interface: no display, no global state, and a figure can be made again long after the run. Files are written whole or
not at all.

Colours: a red-blue diverging map for load, and Okabe and Ito's blue, orange and green for lines, which also differ in
dash; both are readable with every common colour blindness.

Leaves out: interactive pages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from finetune.jsonl import read_metrics

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
# Above this many experts a cell is too narrow for its number.
_MAX_EXPERTS_WITH_VALUES = 16


def load_heat_map(load_LE: Tensor, path: str | Path, *, title: str = "Expert load") -> None:
    """Draws each expert's load relative to an even share, layer by expert, as a PNG.

    White is even. The scale always runs from 0 (never chosen) to 2 (twice its share, or more), so that figures of
    different runs and models can be compared by eye; beyond it the printed value tells.

    Args:
        load_LE: share of assignments per expert [L, E], each row summing to 1.
        path: the PNG to write.
        title: first line above the figure.
    """
    _save(_heat_map(load_LE, title), path)


def load_heat_map_pixels(load_LE: Tensor, title: str) -> np.ndarray:
    """The picture that `load_heat_map` writes, as uint8 RGB [height, width, 3], for loggers that take images."""
    canvas = FigureCanvasAgg(_heat_map(load_LE, title))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _heat_map(load_LE: Tensor, title: str) -> Figure:
    layers, experts = load_LE.shape
    utilization = (load_LE.double() * experts).tolist()
    with_values = experts <= _MAX_EXPERTS_WITH_VALUES
    cell = 0.62 if with_values else max(9.0 / experts, 0.075)
    height = max(layers * (0.27 if with_values else 0.16), 1.0)
    figure = Figure(figsize=(max(experts * cell, 3.6) + 2.0, height + 1.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(utilization, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto", interpolation="nearest")
    if with_values:
        for layer, row in enumerate(utilization):
            for expert, value in enumerate(row):
                # The map is dark at both ends.
                colour = "white" if abs(value - 1.0) > 0.62 else "black"
                # A number lies inside the axes; measuring all of them for the layout takes a third of the time.
                number = axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
                number.set_in_layout(False)
    axes.set_xticks(_ticks(experts, 16))
    axes.set_yticks(_ticks(layers, 32))
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=11)
    bar_height = height + 0.8  # the axes take most of what labels leave over
    bar = figure.colorbar(
        image, ax=axes, extend="max", extendfrac=0.16 / bar_height, aspect=bar_height / 0.16, pad=0.03
    )
    bar.set_ticks([0.0, 0.5, 1.0, 1.5, 2.0], labels=["0", "0.5", "even", "1.5", "2"])
    bar.ax.tick_params(labelsize=9)
    bar.set_label("load / even share")
    bar.outline.set_visible(False)
    return figure


def training_curves(metrics_path: str | Path, path: str | Path, *, title: str = "Training") -> None:
    """Draws loss above MaxVio over the steps, training and evaluation, from a metrics file, as a PNG.

    Without router metrics in the file there is only the loss; with nothing logged yet the axes stay empty.
    """
    records = read_metrics(metrics_path)
    with_router = any("router/max_vio_worst" in record for record in records)
    figure = Figure(figsize=(7.2, 5.6 if with_router else 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(2 if with_router else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize=11)
    loss = panels[0]
    _curve(loss, records, "loss", "training", _BLUE, "-")
    _curve(loss, records, "eval_loss", "held-out", _ORANGE, "--", marker="o")
    loss.set_ylabel("loss (nats per token)")
    if with_router:
        imbalance = panels[1]
        _curve(imbalance, records, "router/max_vio_worst", "worst layer, training", _BLUE, "-")
        _curve(imbalance, records, "router/max_vio_mean", "mean of layers, training", _GREEN, ":")
        _curve(imbalance, records, "eval_router/max_vio_worst", "worst layer, held-out", _ORANGE, "--", marker="o")
        imbalance.set_ylim(bottom=0.0)
        imbalance.set_ylabel("MaxVio (0 is even)")
    for axes in panels:
        axes.grid(True, color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def run_load(metrics_path: str | Path, *, prefix: str = "") -> Tensor | None:
    """Load [L, E] over a whole run, restarts included, from its metrics file; None when it holds no load.

    Args:
        metrics_path: the metrics file.
        prefix: "" for training, "eval_" for evaluation.
    """
    name = re.compile(re.escape(prefix) + r"router/layer_(\d+)/load")
    total, tokens = None, 0
    for record in read_metrics(metrics_path):
        loads = {int(match[1]): value for key, value in record.items() if (match := name.fullmatch(key))}
        if not loads:
            continue
        # Every token makes the same number of assignments, so tokens are the weights of the shares.
        weight = record[f"{prefix}router/tokens"]
        window_LE = torch.tensor([loads[layer] for layer in sorted(loads)], dtype=torch.float64) * weight
        total, tokens = window_LE if total is None else total + window_LE, tokens + weight
    return None if total is None else total / tokens


def _curve(
    axes: Axes, records: Sequence[dict[str, Any]], key: str, label: str, colour: str, dash: str, *, marker: str = ""
) -> None:
    """One line over the records that carry `key`; a gap where the value was not finite."""
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        steps, values = zip(*points, strict=True)
        shown = [float("nan") if value is None else value for value in values]
        if len(shown) == 1 and not marker:
            marker = "."
        axes.plot(steps, shown, dash, color=colour, label=label, linewidth=1.5, marker=marker, markersize=4)


def _ticks(count: int, at_most: int) -> range:
    """Indices to label: all of them while they fit, then every 2nd, 4th, 8th ..."""
    stride = 1
    while count > at_most * stride:
        stride *= 2
    return range(0, count, stride)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
