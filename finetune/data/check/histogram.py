"""The lengths of rows as a histogram in the page.

Every bin is equally wide, whatever it spans, so bins that double in size draw as well as even ones; a length in between
is placed in proportion inside its bin.

Leaves out: the few characters of a terminal (show.py, which does without matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from finetune.report import SOFT, TRAIN, Axes, Drawn, Hint, integer_ticks, together

_LABELS = 6  # at most: six lengths fit beside each other on a phone
_LEAST_HEIGHT = 0.008  # of the tallest: a bin with one row among thousands still shows


def histogram_of(lengths: Mapping[str, Any], max_length: int | None) -> Drawn | None:
    """The drawing of `lengths` (`from` <= tokens < `to`, consecutive bins); None where there is not one row."""
    if not any(each["rows"] for each in lengths["histogram"]):
        return None
    label = f"Histogram of row lengths: median {lengths['median']:,}, longest {lengths['longest']:,} tokens"
    return together([[partial(_bins, lengths=lengths, max_length=max_length)]], label, wide=5.4, tall=3.0)


def _bins(axes: Axes, *, lengths: Mapping[str, Any], max_length: int | None) -> list[Hint]:
    bins: Sequence[Mapping[str, int]] = lengths["histogram"]
    edges = [each["from"] for each in bins] + [bins[-1]["to"]]
    assert all(low < high for low, high in pairwise(edges)), "the bins of a histogram follow each other"
    top = max(each["rows"] for each in bins)
    heights = [each["rows"] and max(each["rows"], _LEAST_HEIGHT * top) for each in bins]
    axes.bar([at + 0.5 for at in range(len(bins))], heights, width=0.84, color=TRAIN)
    axes.set(xlim=(0, len(bins)), ylim=(0, 1.25 * top), xlabel="tokens", ylabel="rows")
    named = range(0, len(edges), -(-len(edges) // _LABELS))
    axes.set_xticks(named, labels=[f"{edges[at]:,}" for at in named])
    integer_ticks(axes, 4)
    axes.grid(True, axis="y")
    marks = [(lengths["median"], f"median {lengths['median']:,}", ":", 1.12)]
    if max_length is not None:
        beyond = " →" if max_length > edges[-1] else ""
        marks.append((max_length, f"max_length {max_length:,}{beyond}", "-", 1.2))
    for length, text, dash, height in marks:
        x = _place(length, edges)
        axes.axvline(x, color=SOFT, linestyle=dash, linewidth=1.2)
        right = x > len(bins) / 2
        aside = axes.annotate(text, (x, height * top), (-4 if right else 4, 0), textcoords="offset points", fontsize=8)
        aside.set(ha="right" if right else "left", va="center")
    return [
        Hint(axes, f"{low:,} to {high - 1:,} tokens: {each['rows']:,}", (at + 0.08, 0, at + 0.92, height))
        for at, (each, height, (low, high)) in enumerate(zip(bins, heights, pairwise(edges), strict=True))
        if each["rows"]
    ]


def _place(length: float, edges: Sequence[int]) -> float:
    """Where a length stands, in bins from the left."""
    for index, (low, high) in enumerate(pairwise(edges)):
        if low <= length < high:
            return index + (length - low) / (high - low)
    return 0.0 if length < edges[0] else float(len(edges) - 1)
