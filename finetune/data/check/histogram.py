"""Where the bars, ticks and marks of the length histogram stand, in percent of its box.

Every bin is equally wide on the page, whatever it spans, so bins that double in size draw as well as even ones; a
length in between is placed in proportion inside its bin. Percent, because the page stretches the box and keeps the
text unstretched beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

_X_LABELS, _Y_LABELS = 6, 4  # at most: six lengths fit beside each other on a phone
_CHARACTERS = 16
_LEAST_HEIGHT = 0.8  # a bin with one row among thousands still shows


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    x: float
    label: str
    kind: Literal["limit", "median"]


@dataclass(frozen=True)
class Histogram:
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]


def histogram_of(lengths: Mapping[str, Any], max_length: int | None) -> Histogram | None:
    """The drawing of `lengths` (`from` <= tokens < `to`, consecutive bins); None where there is not one row."""
    bins: Sequence[Mapping[str, int]] = lengths["histogram"]
    if not any(each["rows"] for each in bins):
        return None
    edges = [each["from"] for each in bins] + [bins[-1]["to"]]
    assert all(low < high for low, high in pairwise(edges)), "the bins of a histogram follow each other"
    width = 100 / len(bins)
    step = _nice_step(max(each["rows"] for each in bins))
    top = step * -(-max(each["rows"] for each in bins) // step)
    bars = [
        Bar(
            x=index * width,
            width=width,
            height=max(_LEAST_HEIGHT, 100 * each["rows"] / top),
            label=f"{low:,} to {high - 1:,} tokens: {each['rows']:,}",
        )
        for index, (each, (low, high)) in enumerate(zip(bins, pairwise(edges), strict=True))
        if each["rows"]
    ]
    every = -(-len(edges) // _X_LABELS)
    x_ticks = [Tick(index * width, f"{edge:,}") for index, edge in enumerate(edges) if index % every == 0]
    y_ticks = [Tick(100 * rows / top, f"{rows:,}") for rows in range(0, top + 1, step)]
    marks = [Mark(_place(lengths["median"], edges), f"median {lengths['median']:,}", "median")]
    if max_length is not None:
        beyond = " →" if max_length > edges[-1] else ""
        marks.append(Mark(_place(max_length, edges), f"max_length {max_length:,}{beyond}", "limit"))
    return Histogram(bars, x_ticks, y_ticks, marks)


def sparkline(lengths: Mapping[str, Any]) -> str:
    """The histogram in a few characters of a terminal; only a stretch of lengths that no row has is blank."""
    rows = [each["rows"] for each in lengths["histogram"]]
    together = -(-len(rows) // _CHARACTERS) or 1
    heights = [sum(rows[i : i + together]) for i in range(0, len(rows), together)]
    top = max(heights, default=0)
    return "".join(" " if not height else "▁▂▃▄▅▆▇█"[min(7, 8 * height // top)] for height in heights)


def _place(length: int, edges: Sequence[int]) -> float:
    for index, (low, high) in enumerate(pairwise(edges)):
        if low <= length < high:
            return 100 * (index + (length - low) / (high - low)) / (len(edges) - 1)
    return 0.0 if length < edges[0] else 100.0


def _nice_step(top: int) -> int:
    """The smallest of 1, 2, 5, 10, 20 ... that divides the axis in few enough parts."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if -(-top // (step * factor)) < _Y_LABELS:
                return step * factor
        step *= 10
