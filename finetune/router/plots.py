"""Figures of a run: the load of every expert at the end and over training, loss beside router imbalance, every layer's
curves against the base, and the drift from it.

How: drawn from numbers alone (a load matrix, or the files that the run left), with matplotlib's object interface: no
display, no global state, and a figure can be made again long after the run. Files are written whole or not at all.

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
from finetune.router.history import DRIFT_METRICS, RouterHistory, Window, at, read_history
from finetune.runfolder import RunFolder

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
# Above this many experts a cell is too narrow for its number.
_MAX_EXPERTS_WITH_VALUES = 16
_ACROSS = 8  # small multiples in a row
# With so many layers there is room for every metric of each; with more, only for the first.
_LAYERS_WITH_ALL_METRICS = 8
_CURVES = {
    "max_vio": "MaxVio",
    "load_entropy": "load entropy",
    "token_entropy": "token entropy",
    "z_loss": "z-loss",
    "balance_loss": "balance loss",
}
_DRIFT_NAMES = ("overlap", "top-1 agreement", "KL (nats)", "JS of load (nats)", "load change")


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
        _plain(axes)
        axes.tick_params(labelsize=9)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def run_figures(run: RunFolder, folder: str | Path) -> list[Path]:
    """Draws all that a run's files have numbers for into `folder`; the files, in order.

    Raises:
        OutputError: a file of the run holds something else than it should.
    """
    folder = Path(folder)
    made = [folder / "training.png"]
    training_curves(run.metrics, made[0])
    load = run_load(run.metrics)
    if load is not None:
        load_heat_map(load, folder / "router_load.png", title="Expert load over the training tokens")
        made.append(folder / "router_load.png")
    history = read_history(run)
    if history.train:
        load_over_training(history.train, folder / "router_load_over_training.png")
        layer_curves(history, folder / "router_layers.png")
        made += [folder / "router_load_over_training.png", folder / "router_layers.png"]
    if history.drift:
        drift_figure(history, folder / "router_drift.png")
        made.append(folder / "router_drift.png")
    return made


def load_over_training(windows: Sequence[Window], path: str | Path) -> None:
    """Draws every layer's load over the logs of a run, expert by log, on the scale of `load_heat_map`, as a PNG.

    Args:
        windows: at least one; columns are as wide as each other, whatever steps they span.
        path: the PNG to write.
    """
    layers, experts = len(windows[0].load), len(windows[0].load[0])
    across, down = _grid(layers)
    panel = min(max(0.16 * experts, 0.9), 2.4)
    width, height = max(1.7 * across, 3.6) + 1.3, (panel + 0.42) * down + 0.95
    # By hand, as for `layer_curves`.
    figure = Figure(figsize=(width, height), dpi=150)
    box = {"left": 0.65 / width, "right": 1 - 0.95 / width, "top": 1 - 0.55 / height, "bottom": 0.5 / height}
    figure.subplots_adjust(**box, wspace=0.12, hspace=0.34 / panel)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    edges = (0.5, len(windows) + 0.5, experts - 0.5, -0.5)
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        columns = np.array([window.load[layer] for window in windows]).T * experts
        image = axes.imshow(
            columns, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto", interpolation="nearest", extent=edges
        )
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    named = sorted({0, len(windows) - 1})
    panels[0, 0].set_xticks([index + 1 for index in named], labels=[f"{windows[index].step:,}" for index in named])
    panels[0, 0].set_yticks(_ticks(experts, 8))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    tall = min(3.0 / height, box["top"] - box["bottom"])
    beside = figure.add_axes((1 - 0.75 / width, box["top"] - tall, 0.13 / width, tall))
    bar = figure.colorbar(image, cax=beside, extend="max")
    bar.set_ticks([0.0, 0.5, 1.0, 1.5, 2.0], labels=["0", "0.5", "even", "1.5", "2"])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    figure.suptitle("Expert load over training, in even shares", fontsize=11)
    _save(figure, path)


def layer_curves(history: RouterHistory, path: str | Path) -> None:
    """Draws each layer's curves over the steps against the base's band, as a PNG.

    Few layers show all metrics, a row each; many show MaxVio, in a grid. Panels of one metric share their scale.
    """
    layers = history.layers
    names = list(_CURVES) if layers <= _LAYERS_WITH_ALL_METRICS else ["max_vio"]
    names = [name for name in names if any(name in window.layers for window in history.train)]
    across, down = (layers, len(names)) if len(names) > 1 else _grid(layers)
    width, height = 1.75 * max(across, 3) + 0.9, 1.35 * max(down, 1) + 1.1
    # By hand: the constrained layout of 30 panels takes two seconds.
    figure = Figure(figsize=(width, height), dpi=150)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, top=1 - 0.65 / height, bottom=0.55 / height, wspace=0.16, hspace=0.3
    )
    panels = figure.subplots(
        max(down, 1), across, sharex=True, sharey="row" if len(names) > 1 else "all", squeeze=False
    )
    cells = [(name, layer) for name in names for layer in range(layers)]
    for axes, (name, layer) in zip(panels.flat, cells, strict=False):
        _layer_panel(axes, history, name, layer)
        if name == names[0]:
            axes.set_title(f"layer {layer}", fontsize=9)
        if layer % across == 0:
            axes.set_ylabel(_CURVES[name], fontsize=9)
    for axes in list(panels.flat)[len(cells) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    known = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if known:
        figure.legend(known.values(), known.keys(), loc="upper center", ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def drift_figure(history: RouterHistory, path: str | Path) -> None:
    """Draws the distance from the base at the last reading by layer, and its mean and worst layer over the readings.

    Args:
        history: with at least one reading.
        path: the PNG to write.
    """
    last, steps = history.drift[-1], [point.step for point in history.drift]
    figure = Figure(figsize=(13.5, 5.0), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(DRIFT_METRICS), squeeze=False)
    for column, (name, title) in enumerate(zip(DRIFT_METRICS, _DRIFT_NAMES, strict=True)):
        by_layer, over = panels[0, column], panels[1, column]
        values = [float("nan") if value is None else value for value in last.layers.get(name, [])]
        by_layer.bar(range(len(values)), values, color=_BLUE, width=0.7)
        by_layer.set_title(title, fontsize=10)
        by_layer.set_xlabel("layer", fontsize=9)
        known = [[value for value in point.layers.get(name, []) if value is not None] for point in history.drift]
        worst = min if name in ("overlap", "top1_agreement") else max
        nan = float("nan")
        over.plot(
            steps, [sum(v) / len(v) if v else nan for v in known], "-", color=_BLUE, label="mean", marker="o", ms=3
        )
        over.plot(
            steps, [worst(v) if v else nan for v in known], "--", color=_ORANGE, label="worst layer", marker="o", ms=3
        )
        over.set_xlabel("step", fontsize=9)
        for axes in (by_layer, over):
            if name == "load_change" and history.base is not None:
                axes.axhline(history.base.noise_floor, color=_GREY, linestyle=":", linewidth=1.2, label="chance")
            if name in ("overlap", "top1_agreement"):
                axes.set_ylim(0.0, 1.02)
            else:
                axes.set_ylim(bottom=0.0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            _plain(axes)
    panels[1, -1].legend(fontsize=8, frameon=False)
    tokens = "" if history.base is None else f" on {history.base.window.tokens:,} tokens"
    figure.suptitle(f"Drift from the base{tokens}, at step {last.step:,} by layer and over the steps", fontsize=11)
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


def _layer_panel(axes: Axes, history: RouterHistory, name: str, layer: int) -> None:
    """One layer's curve of one metric, the base's value and band behind it, and its alarms."""
    base = history.base
    band = None if base is None else base.band(name, layer, history.window_tokens)
    if band is not None:
        axes.axhspan(*band, color="#DADADA", linewidth=0, label="base, 2 standard deviations")
    value = None if base is None else at(base.window.layers.get(name, []), layer)
    if value is not None:
        axes.axhline(value, color=_GREY, linestyle=":", linewidth=1.2)
    for windows, label, colour, dash, marker in (
        (history.train, "training", _BLUE, "-", "" if len(history.train) > 1 else "."),
        (history.held_out, "held-out", _ORANGE, "--", "o"),
    ):
        points = [(window.step, at(window.layers.get(name, []), layer)) for window in windows]
        if points:
            steps, values = zip(*points, strict=True)
            shown = [float("nan") if value is None else value for value in values]
            axes.plot(steps, shown, dash, color=colour, label=label, linewidth=1.2, marker=marker, markersize=3)
    for alarm in history.alarms:
        if alarm.layer == layer:
            axes.axvline(alarm.step, color="#C00020", linewidth=1.0, label="alarm")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(True, color="#E0E0E0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _grid(count: int) -> tuple[int, int]:
    """Columns and rows of so many small multiples."""
    across = min(count, _ACROSS)
    return across, -(-count // across)


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
