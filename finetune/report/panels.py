"""Parts that figures are put together from: lines, bars, grids of small panels, the scale beside a heat map.

A panel is a function that draws on given axes and returns what its places mean; a file puts several into one figure, a
page each into its own. Grids are laid out by hand, in a third of the time that matplotlib's own layout takes.

Leaves out: what is drawn for which question (router/plots.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.report.figures import ALARM, HELD, LINE, MEAN, SOFT, TRAIN, Drawn, Hint, styled
from finetune.report.look import SERIES

Panel = Callable[[Axes], list[Hint]]
Points = Sequence[tuple[float, float | None]]

WIDTH = 10.4  # inches of a figure that takes the whole width of a page
_ACROSS = 8  # small panels in a row of it
_POINTS = 160  # of a line
_LINES = {  # kind of a line: its colour and dash
    "train": (TRAIN, "-"), "held": (HELD, "--"), "mean": (MEAN, ":"), "prompt": (HELD, "-."), "base": (SOFT, "--"),
    **SERIES,
}  # fmt: skip


@styled
def together(rows: Sequence[Sequence[Panel]], label: str, *, wide: float = 4.6, tall: float = 2.4) -> Drawn:
    """Panels as one figure, `wide` and `tall` inches each."""
    width, height = wide * len(rows[0]), tall * len(rows)
    figure = Figure(figsize=(width, height))  # laid out by hand, in a third of the time
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, top=1 - 0.28 / height, bottom=0.45 / height,
        wspace=0.8 / (wide - 0.9), hspace=0.75 / (tall - 0.75),
    )  # fmt: skip
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    hints = [
        hint
        for row, drawn in zip(axes, rows, strict=True)
        for at, panel in zip(row, drawn, strict=True)
        for hint in panel(at)
    ]
    return Drawn(figure, label, hints)


def line_panel(
    axes: Axes,
    *,
    title: str,
    about: str,
    lines: Sequence[tuple[str, str, Points]],
    low: float | None,
    high: float | None = None,
    rules: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[int, str]] = (),
    x: str = "step",
) -> list[Hint]:
    """Named lines of a kind over `x`, rules straight across, and marks straight up."""
    for kind, name, points in lines:
        line(axes, points, kind, name, dots=kind in ("held", "base") or x == "layer")
    _frame(axes, title, about, rules, (low, high))
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if len(lines) > 2:  # above them, in room of its own
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.legend(loc="upper center", ncols=2 if len(lines) == 3 else 3)
    elif lines:
        axes.legend()  # before the alarms, which are many
    else:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=SOFT)
    return mark_alarms(axes, marks)


def bar_panel(
    axes: Axes,
    *,
    title: str,
    about: str,
    values: Sequence[float | None],
    share: bool,
    low: float,
    high: float | None,
    rules: Sequence[tuple[float, str]],
) -> list[Hint]:
    """A bar for each layer."""
    known = [(layer, value) for layer, value in enumerate(values) if value is not None]
    axes.bar([layer for layer, _ in known], [value for _, value in known], color=TRAIN, width=0.72)
    _frame(axes, title, about, rules, (low, high))
    axes.set_xlabel("layer")
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if rules:
        axes.legend()
    return [
        Hint(
            axes,
            f"layer {layer}: " + (f"{value:.1%}" if share else f"{value:.3g}"),
            (layer - 0.36, 0, layer + 0.36, value),
        )
        for layer, value in known
    ]


def line(axes: Axes, points: Points, kind: str, name: str, *, dots: bool = False, width: float = 1.5) -> None:
    """One line, with gaps where a value is missing; a single point is a dot."""
    points = thinned(points, _POINTS)
    known = sum(value is not None for _, value in points)
    if known:
        colour, dash = _LINES[kind]
        steps, values = zip(*((step, math.nan if value is None else value) for step, value in points), strict=True)
        marker = "o" if dots or known == 1 else ""
        (line,) = axes.plot(steps, values, dash, color=colour, label=name, marker=marker, linewidth=width)
        line.set_gid(kind)


def small_multiples(
    count: int, *, tall: float, across: int | None = None, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """So many panels of `tall` inches, all over one range of steps; only the outer ones have numbers."""
    across = across or min(count, _ACROSS)
    down = -(-count // across)
    width, height = max(WIDTH * across / _ACROSS, 4.6), (tall + 0.28) * down + 1.05
    # By hand: the constrained layout of 30 panels takes two seconds.
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.12 / width, top=1 - 0.72 / height, bottom=0.45 / height,
        wspace=0.08, hspace=0.28 / tall,
    )  # fmt: skip
    panels = list(figure.subplots(down, across, sharex=True, sharey=sharey, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for index, axes in enumerate(panels[:count]):
        axes.xaxis.set_visible(index + across >= count)
        axes.yaxis.set_visible(index % across == 0)
        axes.xaxis.set_tick_params(labelbottom=True)  # also above a panel that is not there
    return figure, panels[:count]


def heading(figure: Figure, text: str) -> None:
    width, height = figure.get_size_inches()
    figure.suptitle(text, x=0.6 / width, y=1 - 0.06 / height, ha="left", va="top")


def colour_bar(figure: Figure, image: Any, labels: tuple[str, str, str], **where: Any) -> None:
    bar = figure.colorbar(image, **where)
    bar.set_ticks([image.norm.vmin, (image.norm.vmin + image.norm.vmax) / 2, image.norm.vmax], labels=labels)
    bar.ax.tick_params(length=0)
    bar.outline.set_edgecolor(LINE)
    assert bar.solids is not None, "the scale of a heat map is filled"
    bar.solids.set_gid("ramp")


def bare(axes: Axes, **ticks: Sequence[int]) -> None:
    """Without lines around it or at its ticks."""
    axes.set(**ticks)
    axes.tick_params(length=0)
    axes.spines[:].set_edgecolor(LINE)
    axes.spines[:].set_visible(True)


def _frame(
    axes: Axes, title: str, about: str, rules: Sequence[tuple[float, str]], edges: tuple[float | None, float | None]
) -> None:
    for value, name in rules:
        axes.axhline(value, color=SOFT, linestyle=":", linewidth=1.4, label=name).set_gid("chance")
    axes.set_title(title)
    axes.set_ylabel(about if len(about) < 30 else "")
    axes.grid(True, axis="y")
    axes.set_ylim(*edges)


def cell(x: float, y: float) -> tuple[float, float, float, float]:
    return x - 0.5, y + 0.5, x + 0.5, y - 0.5


def integer_ticks(axes: Axes, most: int) -> None:
    """At most so many round numbers up the axis, none of them a fraction, thousands apart."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=most, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def ticks(count: int, at_most: int) -> range:
    """Indices to label: all of them while they fit, then every 2nd, 4th, 8th ..."""
    stride = 1
    while count > at_most * stride:
        stride *= 2
    return range(0, count, stride)


def thinned(points: Points, most: int) -> list[tuple[float, float | None]]:
    """At most so many points: neighbours become their mean, at the last one's step."""
    every = -(-len(points) // most) or 1
    thin: list[tuple[float, float | None]] = []
    for start in range(0, len(points), every):
        group = points[start : start + every]
        known = [value for _, value in group if value is not None]
        thin.append((group[-1][0], sum(known) / len(known) if known else None))
    return thin


def mark_alarms(axes: Axes, marks: Sequence[tuple[int, str]]) -> list[Hint]:
    """Lines straight up, a hint on each."""
    first, last = axes.get_xlim()
    aside = 0.008 * (last - first)
    for at, _ in marks:
        axes.axvline(at, color=ALARM, linewidth=1.0, alpha=0.7, label="alarm").set_gid("alarm")
    return [Hint(axes, text, (at - aside, -math.inf, at + aside, math.inf), "alarm") for at, text in marks]
