"""The drawing of the lengths: areas and places against counts of single rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from finetune.data.check.histogram import histogram_of
from finetune.data.check.show import sparkline
from tests.data.check.samples import histogram

LENGTHS = np.random.default_rng(0).lognormal(5.5, 0.7, 5000).astype(int).clip(1, 1999)
EVEN = list(range(0, 2001, 100))
DOUBLING = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def binned(edges: list[int]) -> dict:
    rows = [int(((low <= LENGTHS) & (high > LENGTHS)).sum()) for low, high in pairwise(edges)]
    bins = [{"from": edges[i], "to": edges[i + 1], "rows": rows[i]} for i in range(len(rows))]
    return {"longest": int(LENGTHS.max()), "median": int(np.median(LENGTHS)), "histogram": bins}


@pytest.mark.parametrize("edges", [EVEN, DOUBLING])
def test_heights_are_the_numbers_of_rows(edges: list[int]):
    lengths = binned(edges)
    drawn = histogram_of(lengths, None)
    assert drawn is not None
    (axes,) = drawn.figure.axes
    rows = [each["rows"] for each in lengths["histogram"]]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [number and max(number, 0.008 * max(rows)) for number in rows]
    places = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert places == pytest.approx([at + 0.5 for at in range(len(rows))])  # all as wide, whatever they span
    said = [hint.text for hint in drawn.hints]
    assert [int(text.rpartition(" ")[2].replace(",", "")) for text in said] == [number for number in rows if number]
    assert said[0].startswith(f"{edges[rows.index(next(filter(None, rows)))]:,} to ")


def marks(lengths: dict, max_length: int) -> dict[str, float]:
    """Where the lines straight up stand, in bins from the left, by what is written beside them."""
    drawn = histogram_of(lengths, max_length)
    assert drawn is not None
    (axes,) = drawn.figure.axes
    texts = [text.get_text().strip() for text in axes.texts]
    return dict(zip(texts, (float(line.get_xdata()[0]) for line in axes.lines), strict=True))


def test_a_mark_stands_at_its_length():
    assert marks(binned(EVEN), 1024)["max_length 1,024"] == pytest.approx(20 * 1024 / 2000)
    # In a bin that spans 512 to 1024, three quarters of the way are at 896.
    assert marks(binned(DOUBLING), 896)["max_length 896"] == pytest.approx(9.75)
    median = int(np.median(LENGTHS))
    assert marks(binned(EVEN), 1024)[f"median {median:,}"] == pytest.approx(median / 100)


def test_a_limit_beyond_all_rows_points_outwards():
    assert marks(binned(EVEN), 4096)["max_length 4,096 →"] == 20
    assert "max_length 2,000" in marks(binned(EVEN), 2000)


def test_without_rows_nothing_is_drawn():
    assert histogram_of({"longest": 0, "median": 0, "histogram": []}, 1024) is None
    assert histogram_of({"longest": 0, "median": 0, "histogram": histogram([0, 0], 8)}, None) is None


def test_the_sparkline_is_short_and_blank_only_where_nothing_is():
    assert sparkline({"histogram": histogram([1, 0, 4, 8], 10)}) == "▂ ▅█"
    assert sparkline({"histogram": histogram([10000] + 23 * [1], 10)}) == "█▁▁▁▁▁▁▁▁▁▁▁"
    assert sparkline({"histogram": []}) == ""
