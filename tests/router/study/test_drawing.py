"""Heat maps and charts: pixels read back by another decoder, positions against arithmetic."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from finetune.router.study import drawing
from finetune.router.study.drawing import Scale, Series, bars, chart, picture, scale_of, step_scale, step_ticks, thinned


def pixels(address: str) -> np.ndarray:
    """RGBA from 0 to 1, [rows, columns, 4]."""
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return image.imread(io.BytesIO(base64.b64decode(content)), format="png")


def test_a_picture_has_a_pixel_a_shade():
    shades = [[0.0, 1.0, -1.0, 0.5], [-0.5, 7.0, -7.0, None]]
    found = pixels(picture(shades))
    assert found.shape == (2, 4, 4)
    assert found[0, 0, 3] == 0  # even is the page itself
    for row, column, colour, alpha in (
        (0, 1, drawing.MORE, 1.0),
        (0, 2, drawing.LESS, 1.0),
        (0, 3, drawing.MORE, 0.5),
        (1, 0, drawing.LESS, 0.5),
        (1, 1, drawing.MORE, 1.0),
        (1, 2, drawing.LESS, 1.0),
        (1, 3, drawing.MISSING, 110 / 255),
    ):
        assert found[row, column, :3] * 255 == pytest.approx(colour)
        assert found[row, column, 3] == pytest.approx(alpha, abs=0.02)


def test_shades_keep_their_order():
    shades = np.linspace(-1, 1, 63)
    found = pixels(picture([shades.tolist()]))[0]
    signed = np.where(found[:, 0] * 255 < 100, -1, 1) * found[:, 3]
    assert np.all(np.diff(signed) > 0)
    assert signed == pytest.approx(shades, abs=0.003)


@pytest.mark.parametrize(("card", "ink", "opacity"), [("#ffffff", "#1a211d", 1.0), ("#191f1c", "#e7ece9", 0.62)])
def test_numbers_can_be_read_on_the_strongest_colours(card: str, ink: str, opacity: float):
    css = "".join((Path(drawing.__file__).parent / name).read_text() for name in ("base.css.jinja", "report.css.jinja"))
    assert f"--card: {card}" in css
    assert f"--ink: {ink}" in css
    assert f"--heat: {opacity:g}" in css.replace("--heat: .", "--heat: 0.")

    def channels(text: str) -> list[int]:
        return [int(text[at : at + 2], 16) for at in (1, 3, 5)]

    def luminance(colour: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for strongest in (drawing.LESS, drawing.MORE):
        mixed = [opacity * c + (1 - opacity) * b for c, b in zip(strongest, channels(card), strict=True)]
        dark, light = sorted((luminance(mixed), luminance(channels(ink))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("values", "low", "high", "labels"),
    [
        ([0.0, 0.93], 0.0, None, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([3.61, 6.42], None, None, ["3", "4", "5", "6", "7"]),
        ([0.981, 0.998], None, 1.0, ["0.980", "0.985", "0.990", "0.995", "1.000"]),
        ([12_000.0], 0.0, None, ["0", "5,000", "10,000", "15,000"]),
        ([0.0], 0.0, None, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([2.0, 2.0], None, None, ["1.50", "1.75", "2.00", "2.25", "2.50"]),
        ([], None, None, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
    ],
)
def test_scales_are_round_and_hold_everything(values: list, low: float | None, high: float | None, labels: list[str]):
    scale = scale_of(values, low=low, high=high)
    ticks = scale.ticks()
    assert [tick.label for tick in ticks] == labels
    assert (ticks[0].at, ticks[-1].at) == (0, pytest.approx(100))
    for value in values:
        assert scale.low <= value <= scale.high


def test_step_ticks_are_round():
    for first, last in ((0, 300), (5, 240), (1, 2), (0, 7), (10, 3000), (0, 100_000), (7, 7)):
        ticks = step_ticks(step_scale(first, last))
        steps = [int(tick.label.replace(",", "")) for tick in ticks]
        assert 1 <= len(ticks) <= 6
        assert all(first <= step <= last for step in steps)
        assert all(int(str(step).rstrip("0") or 0) < 1000 for step in steps)
        for tick, step in zip(ticks, steps, strict=True):
            assert tick.at == pytest.approx(100 * (step - first) / (last - first) if last > first else 50)


def test_lines_break_where_a_value_is_missing():
    x, y = step_scale(0, 100), Scale(0.0, 2.0, 1.0)
    drawn = chart([Series("train", [(0, 0.0), (50, 1.0), (60, None), (100, 2.0)], dotted=True)], x, y, band=(0.5, 1.0))
    (line,) = drawn.lines
    assert line.d == "M0 100L50 50M100 0"
    assert line.dots == "M0 100h0M50 50h0M100 0h0"
    assert drawn.band == "M0 50H100V75H0Z"
    assert chart([Series("train", [(5, None)])], x, y).lines == []
    assert chart([Series("train", [(50, 1.0)])], x, y).lines[0].dots == "M50 50h0"  # one point is a dot


def test_bars_stand_side_by_side():
    drawn = bars([1.0, None, 4.0], ["a", "b", "c"], Scale(0.0, 4.0, 1.0), [(2.0, "chance", "by chance")])
    assert [(bar.x, bar.height, bar.title) for bar in drawn.bars] == [
        (0.0, 25.0, "a"),
        (pytest.approx(200 / 3), 100.0, "c"),
    ]
    assert [(rule.at, rule.kind) for rule in drawn.rules] == [(50.0, "chance")]
    assert [tick.label for tick in drawn.x_ticks] == ["0", "1", "2"]


def test_thinned_points_are_means():
    points = [(step, float(step)) for step in range(1, 8)]
    assert thinned(points, 7) == points
    assert thinned(points, 3) == [(3, 2.0), (6, 5.0), (7, 7.0)]
    assert thinned([(1, None), (2, 4.0), (3, None), (4, None)], 2) == [(2, 4.0), (4, None)]
    assert thinned([], 5) == []


def test_paths_are_short():
    drawn = chart([Series("train", [(1, 1 / 3), (2, 2 / 3)])], step_scale(1, 2), Scale(0.0, 1.0, 0.5))
    assert re.fullmatch(r"M0 66\.67L100 33\.33", drawn.lines[0].d)
