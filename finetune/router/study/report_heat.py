"""A run's load as heat maps: the base, the end and the difference, and every layer over training.

Even shares have no colour, so a healthy router is a pale page. Long runs are thinned by the means of neighbouring logs,
weighted by their tokens; in large models a row of cells shares one title.

Leaves out: pixels (drawing.py), curves (report_figures.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.router.history import RouterHistory, Window
from finetune.router.study.drawing import Cell, Heat, heat, picture
from finetune.router.study.verdict import Comparison

# A difference of half an even share has the full colour.
_DIFFERENCE = 0.5
_COLUMNS = 48
# Above so many cells a map has one title a row; above so many experts there is no room for a number in a cell.
_TITLES, _NUMBERS = 12_000, 8


@dataclass(frozen=True)
class LoadMap:
    """Layer by expert, at one state or between two."""

    name: str
    heat: Heat
    kind: str


@dataclass(frozen=True)
class TrainingPanel:
    """One layer's load over training: expert by log, and the base's as a strip."""

    layer: int
    heat: Heat
    strip: str | None
    value: str


def load_maps(compared: Comparison) -> list[LoadMap]:
    """Base, end and difference."""
    before, after = (_utilization(window) for window in (compared.before, compared.after))
    change = [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)]
    return [
        LoadMap(
            compared.before_name, _layers_by_experts([[u - 1 for u in row] for row in before], before, "{:.2f}"), "load"
        ),
        LoadMap(
            compared.after_name, _layers_by_experts([[u - 1 for u in row] for row in after], after, "{:.2f}"), "load"
        ),
        LoadMap(
            "difference",
            _layers_by_experts([[u / _DIFFERENCE for u in row] for row in change], change, "{:+.2f}"),
            "change",
        ),
    ]


def training_panels(history: RouterHistory) -> list[TrainingPanel]:
    """Each layer's load over the training logs, the base's beside it."""
    groups = _groups(history.train, _COLUMNS)
    if not groups:
        return []
    steps = [group[-1].step for group in groups]
    each = history.layers * history.experts * len(groups) <= _TITLES
    panels = []
    for layer in range(history.layers):
        columns = [_mean_load(group, layer) for group in groups]
        rows = [[column[expert] * history.experts for column in columns] for expert in range(history.experts)]
        if each:
            cells = [
                Cell(f"layer {layer}, expert {expert}, step {step}: {value:.2f}")
                for expert, row in enumerate(rows)
                for step, value in zip(steps, row, strict=True)
            ]
        else:
            cells = [
                Cell(
                    f"layer {layer}, expert {expert}: {row[0]:.2f}, at last {row[-1]:.2f}, "
                    f"between {min(row):.2f} and {max(row):.2f}"
                )
                for expert, row in enumerate(rows)
            ]
        base = history.base
        strip = None if base is None else [[share * history.experts - 1] for share in base.window.load[layer]]
        drawn = heat([[value - 1 for value in row] for row in rows], cells, across=len(groups) if each else 1)
        busiest = max(row[-1] for row in rows)
        panels.append(TrainingPanel(layer, drawn, None if strip is None else picture(strip), f"{busiest:.2f}"))
    return panels


def _utilization(window: Window) -> list[list[float]]:
    return [[share * len(row) for share in row] for row in window.load]


def _layers_by_experts(shades: Sequence[Sequence[float]], values: Sequence[Sequence[float]], form: str) -> Heat:
    experts = len(values[0])
    said = [[form.format(round(value, 2) + 0.0) for value in row] for row in values]  # never -0.00
    cells = [
        Cell(f"layer {layer}, expert {expert}: {text}", text if experts <= _NUMBERS else "")
        for layer, row in enumerate(said)
        for expert, text in enumerate(row)
    ]
    return heat(shades, cells, across=experts, y_labels=32, x_labels=16 if experts <= 16 else 8)


def _groups(windows: Sequence[Window], most: int) -> list[Sequence[Window]]:
    every = -(-len(windows) // most) or 1
    return [windows[start : start + every] for start in range(0, len(windows), every)]


def _mean_load(group: Sequence[Window], layer: int) -> list[float]:
    """Load of a layer over neighbouring logs: every token makes as many choices, so tokens are the weights."""
    weights = [max(window.tokens, 1) for window in group]
    columns = zip(*(window.load[layer] for window in group), strict=True)
    return [sum(w * f for w, f in zip(weights, shares, strict=True)) / sum(weights) for shares in columns]
