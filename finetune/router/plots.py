"""Figures of a run's routing: what is drawn for which question, once for files, loggers and pages.

Why small multiples: a mean over layers hides the one layer that collapses, so each layer has its own small panel, all
of a metric on one scale, with the base's band behind it and alarms as marks. How: from numbers alone (a load, or the
history that a run's files left), so that a figure can be made again long after the run. A panel is a function that
draws on given axes and returns what its places mean; a file puts several into one figure, a page each into its own.
Long runs are thinned by means of neighbouring logs.

Leaves out: how a figure becomes a file or part of a page, and colours (report/figures.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from finetune.report import (
    HEAT,
    INK,
    SOFT,
    WIDTH,
    Drawn,
    Hint,
    Panel,
    Points,
    bar_panel,
    bare,
    cell,
    colour_bar,
    heading,
    line,
    line_panel,
    mark_alarms,
    small_multiples,
    styled,
    ticks,
    together,
)
from finetune.router.drift import chance_overlap
from finetune.router.history import RouterHistory, Window, at, read_history
from finetune.router.metrics import random_repetition
from finetune.runfolder import RunFolder

# What each curve is called, how it is read, and the edges that its scale has at least.
METRICS: dict[str, tuple[str, str, float | None, float | None]] = {
    "max_vio": ("MaxVio", "how far the busiest expert is above an even share; 0 is even", 0.0, None),
    "load_entropy": ("Load entropy", "how evenly the load is spread, 1 is even", None, 1.0),
    "token_entropy": ("Token entropy", "how undecided the router is about a token, nats", None, None),
    "z_loss": ("z-loss", "mean of logsumexp(logits)², grows with the size of the logits", None, None),
    "balance_loss": ("Balance loss", "E · Σ load · probability, 1 is even", None, 1.0),
}
DRIFT = {
    "overlap": ("Overlap", "share of the chosen experts that the base chose too"),
    "top1_agreement": ("Top-1 agreement", "share of tokens whose first expert is the base's"),
    "kl": ("KL", "from the base's router distribution to the tuned one, nats"),
    "js_load": ("Jensen-Shannon divergence of the load", "between the base's load and the tuned one, nats"),
    "load_change": ("Load change", "largest change of an expert's load, in even shares"),
}
# Above so many experts a cell is too narrow for its number; above so many cells a row of them shares one hint.
_NUMBERS, _CELLS = 16, 6_000
_COLUMNS = 48  # of a load over training
_LAYERS_WITH_ALL_METRICS = 8  # in one file; of more layers it shows the first metric
_DIFFERENCE = 0.5  # of an even share has the full colour


def run_figures(run: RunFolder, folder: str | Path) -> list[Path]:
    """Draws all that a run's files have numbers for into `folder`, as PNG; the files, in order.

    Raises:
        OutputError: a file of the run holds something else than it should.
    """
    history = read_history(run)
    made = {"training": together([[panel] for panel in training_panels(history)], "Training", wide=7.2)}
    if history.train:
        load = [mean_load(history.train, layer) for layer in range(history.layers)]
        made["router_load"] = load_heat_map(load, title="Expert load over the training tokens")
        made["router_load_over_training"] = load_over_training(history)
        few = history.layers <= _LAYERS_WITH_ALL_METRICS
        made["router_layers"] = layer_curves(history, logged_metrics(history) if few else ["max_vio"])
    if history.drift:
        rows = list(zip(*drift_panels(history), strict=True))
        made["router_drift"] = together(rows, f"Drift from the base at step {history.drift[-1].step:,}", wide=2.9)
    return [drawn.save(Path(folder) / f"{name}.png") for name, drawn in made.items()]


@dataclass(frozen=True)
class HeatMap:
    """Values [rows][columns], and what they are compared with.

    The scale is always the same, so that figures of different runs and models can be compared by eye; beyond it the
    printed value tells. None has no colour.

    Attributes:
        middle: the value without a colour, and what it is called.
        reach: how far from it a value has the full colour.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    middle: tuple[float, str] = (1.0, "even")
    reach: float = 1.0
    rows: str = "layer"

    @classmethod
    def of_load(cls, title: str, load: Sequence[Sequence[float]]) -> HeatMap:
        """Shares of assignments [L][E], each row summing to 1, in even shares: from 0 (never chosen) to twice that."""
        return cls(title, [[share * len(row) for share in row] for row in load])


def load_heat_map(load: Sequence[Sequence[float]], *, title: str = "Expert load") -> Drawn:
    """Each expert's load relative to an even share, from shares [L][E]."""
    return heat_maps(title, [HeatMap.of_load(title, load)])


def load_heat_map_pixels(load_LE: Tensor, title: str) -> np.ndarray:
    """The same as uint8 RGB [height, width, 3], for loggers that take images."""
    return load_heat_map(load_LE.tolist(), title=title).pixels()


def load_maps(before: Window, after: Window, names: tuple[str, str]) -> Drawn:
    """Two states of the load and their difference, beside each other."""
    maps = [HeatMap.of_load(name, window.load) for name, window in zip(names, (before, after), strict=True)]
    change = np.array(maps[1].values, dtype=float) - np.array(maps[0].values, dtype=float)
    maps.append(HeatMap("difference", change.tolist(), (0.0, "same"), _DIFFERENCE))
    return heat_maps(f"Load, layer by expert: {names[0]}, {names[1]}, and the difference", maps)


@styled
def heat_maps(label: str, maps: Sequence[HeatMap]) -> Drawn:
    """Heat maps of one shape beside each other, experts across."""
    rows, experts = len(maps[0].values), len(maps[0].values[0])
    numbered = experts <= _NUMBERS
    across = min(max(experts * (0.5 if numbered else 0.06), 2.8), 8.0) if len(maps) == 1 else WIDTH / len(maps) - 0.6
    height = max(rows * min(0.27, 7.0 / rows), 0.9)
    figure = Figure(figsize=((across + 0.6) * len(maps) + 0.5, height + 1.0), layout="constrained")
    small = {"fontsize": min(8.0, 72 * across / experts / 2.6, 72 * height / rows * 0.75)}
    hints = []
    for axes, each in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        (middle, called), signed = each.middle, each.middle[0] == 0
        low, high = middle - each.reach, middle + each.reach
        values = np.array(each.values, dtype=float)
        image = axes.imshow(values, cmap=HEAT, vmin=low, vmax=high, aspect="auto", interpolation="none")
        for row, expert in zip(*np.isfinite(values).nonzero(), strict=True):
            value = round(float(values[row, expert]), 2) + 0.0  # never -0.00
            text = f"{value:+.2f}" if signed else f"{value:.2f}"
            hints.append(Hint(axes, f"{each.rows} {row}, expert {expert}: {text}", cell(expert, row)))
            if numbered:
                # It lies inside the axes; measuring all of them for the layout takes a third of the time.
                axes.text(expert, row, text, ha="center", va="center", **small).set_in_layout(False)
        bare(axes, xticks=ticks(experts, 16 if numbered else 8), yticks=ticks(rows, 32))
        axes.set(title=each.title, xlabel="expert", ylabel=each.rows if axes is figure.axes[0] else "")
        labels = (f"{low:+g}", called, f"{high:+g}") if signed else (f"{low:g}", called, f"{high:g} or more")
        colour_bar(figure, image, labels, ax=axes, location="bottom", aspect=35, pad=0.02, shrink=0.9)
    return Drawn(figure, label, hints)


@styled
def load_over_training(history: RouterHistory) -> Drawn:
    """Every layer's load over the training logs, expert by log, the base's as a strip at the left.

    Columns are as wide as each other, whatever steps they span; the number is the busiest expert's load at the end.
    """
    every = -(-len(history.train) // _COLUMNS)
    groups = [history.train[start : start + every] for start in range(0, len(history.train), every)]
    steps, experts = [group[-1].step for group in groups], history.experts
    figure, panels = small_multiples(history.layers, tall=min(max(0.11 * experts, 0.8), 1.6), sharey=True)
    each = history.layers * experts * len(groups) <= _CELLS
    right, strip = len(groups) + 0.5, 0.09 * len(groups)
    hints = []
    for layer, axes in enumerate(panels):
        columns_GE = np.array([mean_load(group, layer) for group in groups]) * experts
        scale: dict[str, Any] = {"cmap": HEAT, "vmin": 0.0, "vmax": 2.0, "aspect": "auto", "interpolation": "none"}
        image = axes.imshow(columns_GE.T, extent=(0.5, right, experts - 0.5, -0.5), **scale)
        if history.base is not None:
            base = np.array([history.base.window.load[layer]]).T * experts
            axes.imshow(base, extent=(0.5 - 1.4 * strip, 0.5 - 0.4 * strip, experts - 0.5, -0.5), **scale)
        axes.set_xlim(0.5 - (1.4 * strip if history.base is not None else 0.0), right)
        axes.set_title(f"layer {layer}")
        axes.set_title(f"{columns_GE[-1].max():.2f}", loc="right", color=SOFT)
        bare(axes)
        for expert, row in enumerate(columns_GE.T.tolist()):
            where = f"layer {layer}, expert {expert}"
            if each:
                cells = enumerate(zip(steps, row, strict=True))
                hints += [Hint(axes, f"{where}, step {s}: {x:.2f}", cell(at + 1, expert)) for at, (s, x) in cells]
            else:
                said = f"{row[0]:.2f}, at last {row[-1]:.2f}, between {min(row):.2f} and {max(row):.2f}"
                hints.append(Hint(axes, f"{where}: {said}", (0.5, expert + 0.5, right, expert - 0.5)))
    named = sorted({0, len(groups) - 1})
    panels[0].set_xticks([index + 1 for index in named], labels=[f"{steps[index]:,}" for index in named])
    for axes in panels:
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=False):
            label.set(horizontalalignment=side)
    panels[0].set_yticks(ticks(experts, 8))
    figure.supxlabel("step")
    figure.supylabel("expert")
    heading(figure, "Expert load over training")
    width, height = figure.get_size_inches()
    above = figure.add_axes((1 - 2.2 / width, 1 - 0.42 / height, 1.6 / width, 0.09 / height))
    colour_bar(figure, image, ("0", "even", "2 or more"), cax=above, orientation="horizontal", ticklocation="top")
    return Drawn(figure, "Load of every layer over training, expert by step", hints)


@dataclass(frozen=True)
class LayerCurve:
    """A metric of one layer over a run, and the base's."""

    layer: int
    train: Points
    held_out: Points
    base: float | None
    band: tuple[float, float] | None

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(step, value) for step, value in self.train if value is not None]

    @property
    def outside(self) -> bool:
        """Whether it ends outside the base's band."""
        return self.band is not None and bool(self.known) and not self.band[0] <= self.known[-1][1] <= self.band[1]

    def __str__(self) -> str:
        text = f"layer {self.layer}"
        if self.known:
            (first, begins), (last, ends) = self.known[0], self.known[-1]
            text += f": {begins:.3g} at step {first:g}, {ends:.3g} at step {last:g}"
        if self.base is not None:
            band = "" if self.band is None else f", band {self.band[0]:.3g} to {self.band[1]:.3g}"
            text += f"; base {self.base:.3g}{band}"
        return text


def curves_of(history: RouterHistory, name: str) -> list[LayerCurve]:
    """A metric of every layer."""

    def points(windows: Sequence[Window], layer: int) -> Points:
        return [(window.step, at(window.layers.get(name, []), layer)) for window in windows]

    base = history.base
    return [
        LayerCurve(
            layer,
            points(history.train, layer),
            points(history.held_out, layer),
            None if base is None else at(base.window.layers.get(name, []), layer),
            None if base is None else base.band(name, layer, history.window_tokens),
        )
        for layer in range(history.layers)
    ]


def logged_metrics(history: RouterHistory) -> list[str]:
    return [name for name in METRICS if any(name in w.layers for w in (*history.train, *history.held_out))]


@styled
def layer_curves(history: RouterHistory, names: Sequence[str]) -> Drawn:
    """Each layer's curves over the steps against the base's band; panels of one metric share their scale.

    One metric fills a grid; several have a row each.
    """
    across = history.layers if len(names) > 1 else None
    figure, panels = small_multiples(history.layers * len(names), tall=0.72, across=across)
    hints = []
    for row, name in enumerate(names):
        mine = panels[row * history.layers : (row + 1) * history.layers]
        for axes, curve in zip(mine, curves_of(history, name), strict=True):
            if axes is not mine[0]:
                axes.sharey(mine[0])
            if curve.band is not None:
                axes.axhspan(*curve.band, color=SOFT, alpha=0.17, linewidth=0, label="base, ±2 sd").set_gid("band")
            if curve.base is not None:
                axes.axhline(curve.base, color=SOFT, linestyle=":", linewidth=1.2).set_gid("base")
            line(axes, curve.train, "train", "training", width=1.2)
            line(axes, curve.held_out, "held", "held-out", dots=True, width=1.2)
            hints.append(Hint(axes, str(curve)))
            hints += mark_alarms(axes, _alarms(history, curve.layer))
            axes.set_title(f"layer {curve.layer}" if row == 0 else "")
            if curve.known:
                end = f"{curve.known[-1][1]:.{digits(name)}f}"
                said = axes.set_title(end, loc="right", color=SOFT)
                if curve.outside:
                    said.set(color=INK, fontweight="bold")
        _, _, low, high = METRICS[name]
        bottom, top = mine[0].get_ylim()
        mine[0].set_ylim(bottom if low is None else low, top if high is None else max(top, high))
        mine[0].yaxis.set_major_locator(MaxNLocator(nbins=3))
        if len(names) > 1:
            mine[0].set_ylabel(METRICS[name][0])
    panels[0].xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    figure.supxlabel("step")
    known = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    heading(figure, METRICS[names[0]][0] if len(names) == 1 else "Layer by layer")
    if known:
        place = (0.55 / figure.get_figwidth(), 1 - 0.18 / figure.get_figheight())
        figure.legend(known.values(), known.keys(), loc="upper left", bbox_to_anchor=place, ncols=4, borderaxespad=0.2)
    return Drawn(figure, ", ".join(METRICS[name][0] for name in names) + " of every layer", hints, spoken=True)


def training_panels(history: RouterHistory) -> list[Panel]:
    """Loss, the worst layer's MaxVio, prompt and completion apart, and what an auxiliary loss added."""

    def scalar(windows: Sequence[Window], name: str) -> Points:
        return [(window.step, window.scalars.get(name)) for window in windows]

    train, held_out, worst = history.train, history.held_out, "max_vio_worst"
    panels: list[tuple[str, str, float | None, list[tuple[str, str, Points]]]] = [
        ("Loss", "nats per token", None, [
            ("train", "training", history.loss),
            ("held", "held-out", history.held_out_loss),
        ]),
        ("MaxVio", "0 is even", 0.0, [
            ("train", "worst layer, training", scalar(train, worst)),
            ("mean", "mean of layers, training", scalar(train, "max_vio_mean")),
            ("held", "worst layer, held-out", scalar(held_out, worst)),
        ]),
        ("MaxVio of prompt and completion", "worst layer, training", 0.0, [
            ("train", "completion", scalar(train, f"completion/{worst}")),
            ("prompt", "prompt", scalar(train, f"prompt/{worst}")),
        ]),
        ("Auxiliary loss", "added to the loss", 0.0, [
            ("train", "weighted balance and z-loss", scalar(train, "aux/weighted")),
        ]),
    ]  # fmt: skip
    found: list[Panel] = []
    for title, about, low, lines in panels:
        drawn = [line for line in lines if any(value is not None for _, value in line[2])]
        if drawn or not found:  # the loss is always there, if only to say that nothing was logged
            found.append(partial(line_panel, title=title, about=about, lines=drawn, low=low, marks=_alarms(history)))
    return found


def drift_panels(history: RouterHistory) -> list[tuple[Panel, Panel]]:
    """For each measure the last reading by layer, and mean and worst layer over the readings."""
    found: list[tuple[Panel, Panel]] = []
    last = history.drift[-1]
    for name, (title, about) in DRIFT.items():
        values = last.layers.get(name, [])
        if not any(value is not None for value in values):
            continue
        share = name in ("overlap", "top1_agreement")
        over = [[value for value in point.layers.get(name, []) if value is not None] for point in history.drift]
        read = [(point.step, known) for point, known in zip(history.drift, over, strict=True) if known]
        largest = max(value for _, known in read for value in known)
        # A rule far above all values would flatten them.
        rules = [rule for rule in _chance(history, name) if share or rule[0] < 4 * largest]
        scale: dict[str, Any] = {"title": title, "low": 0.0, "high": 1.02 if share else None, "rules": rules}
        lines = [
            ("train", "mean of layers", [(step, sum(known) / len(known)) for step, known in read]),
            ("held", "worst layer", [(step, (min if share else max)(known)) for step, known in read]),
        ]
        found.append(
            (
                partial(bar_panel, about=about, values=values, share=share, **scale),
                partial(line_panel, about="", lines=lines, **scale),
            )
        )
    return found


def repetition_panels(history: RouterHistory, before: Window, after: Window, names: tuple[str, str]) -> list[Panel]:
    """The same first expert, and any in common, for neighbouring tokens: two states by layer, beside chance."""
    chance = None if history.base is None else random_repetition(history.experts, history.base.top_k)
    found: list[Panel] = []
    for index, (name, title) in enumerate(
        (("repeat_first", "Same first expert"), ("repeat_any", "An expert in common"))
    ):
        lines = [
            (kind, state, list(enumerate(window.layers[name])))
            for kind, state, window in (("base", names[0], before), ("train", names[1], after))
            if name in window.layers
        ]
        if lines:
            rules = [] if chance is None else [(chance[index], "random routing")]
            about = "share of neighbouring tokens"
            found.append(partial(line_panel, title=title, about=about, lines=lines, rules=rules, low=0.0, x="layer"))
    return found


# ---- parts of panels ------------------------------------------------------------------------------------------------


def _alarms(history: RouterHistory, layer: int | None = None) -> list[tuple[int, str]]:
    """Step and text of the alarms of a layer; of all where none is given."""
    return [
        (alarm.step, f"step {alarm.step}: {alarm.message}") for alarm in history.alarms if layer in (None, alarm.layer)
    ]


def _chance(history: RouterHistory, name: str) -> list[tuple[float, str]]:
    if history.base is None:
        return []
    if name == "overlap":
        return [(chance_overlap(history.experts, history.base.top_k), "random routing")]
    if name == "top1_agreement":
        return [(1 / history.experts, "random routing")]
    return [(history.base.noise_floor, "what chance shows")] if name == "load_change" else []


def mean_load(group: Sequence[Window], layer: int) -> list[float]:
    """Load of a layer over some logs: every token makes as many choices, so tokens are the weights."""
    weights = [max(window.tokens, 1) for window in group]
    columns = zip(*(window.load[layer] for window in group), strict=True)
    return [sum(w * f for w, f in zip(weights, shares, strict=True)) / sum(weights) for shares in columns]


def digits(name: str) -> int:
    """Decimals that tell one layer from another: load entropies lie just below 1."""
    return 3 if name == "load_entropy" else 2
