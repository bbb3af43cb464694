"""The drawing of the lengths: areas and places against counts of single rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from finetune.data.check.histogram import histogram_of, sparkline
from tests.data.check.samples import histogram

LENGTHS = np.random.default_rng(0).lognormal(5.5, 0.7, 5000).astype(int).clip(1, 1999)
EVEN = list(range(0, 2001, 100))
DOUBLING = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def binned(edges: list[int]) -> dict:
    rows = [int(((low <= LENGTHS) & (high > LENGTHS)).sum()) for low, high in pairwise(edges)]
    bins = [{"from": edges[i], "to": edges[i + 1], "rows": rows[i]} for i in range(len(rows))]
    return {"longest": int(LENGTHS.max()), "median": int(np.median(LENGTHS)), "histogram": bins}


@pytest.mark.parametrize("edges", [EVEN, DOUBLING])
def test_heights_are_in_proportion_and_the_axis_says_how_much(edges: list[int]):
    lengths = binned(edges)
    drawing = histogram_of(lengths, None)
    assert drawing is not None
    top = drawing.y_ticks[-1]
    assert top.at == 100
    assert 2 <= len(drawing.y_ticks) <= 5
    full = int(top.label.replace(",", ""))
    rows = [each["rows"] for each in lengths["histogram"] if each["rows"]]
    assert max(rows) <= full
    for bar, number in zip(drawing.bars, rows, strict=True):
        assert bar.height == pytest.approx(max(100 * number / full, 0.8))
        assert bar.label.endswith(f": {number:,}")


def test_a_mark_stands_at_its_length():
    drawing = histogram_of(binned(EVEN), 1024)
    assert drawing is not None
    assert {mark.kind: mark.x for mark in drawing.marks}["limit"] == pytest.approx(100 * 1024 / 2000)
    for tick in drawing.x_ticks:
        assert tick.at == pytest.approx(100 * int(tick.label.replace(",", "")) / 2000)
    assert len(drawing.x_ticks) <= 6
    # In a bin that spans 512 to 1024, three quarters of the way are at 896.
    doubling = histogram_of(binned(DOUBLING), 896)
    assert doubling is not None
    assert {mark.kind: mark.x for mark in doubling.marks}["limit"] == pytest.approx(100 * 9.75 / 11)


def test_a_limit_beyond_all_rows_points_outwards():
    drawing = histogram_of(binned(EVEN), 4096)
    assert drawing is not None
    assert [(mark.x, mark.label) for mark in drawing.marks if mark.kind == "limit"] == [(100.0, "max_length 4,096 →")]
    at_the_edge = histogram_of(binned(EVEN), 2000)
    assert at_the_edge is not None
    assert at_the_edge.marks[-1].label == "max_length 2,000"


def test_without_rows_nothing_is_drawn():
    assert histogram_of({"longest": 0, "median": 0, "histogram": []}, 1024) is None
    assert histogram_of({"longest": 0, "median": 0, "histogram": histogram([0, 0], 8)}, None) is None


def test_the_sparkline_is_short_and_blank_only_where_nothing_is():
    assert sparkline({"histogram": histogram([1, 0, 4, 8], 10)}) == "▂ ▅█"
    assert sparkline({"histogram": histogram([10000] + 23 * [1], 10)}) == "█▁▁▁▁▁▁▁▁▁▁▁"
    assert sparkline({"histogram": []}) == ""
