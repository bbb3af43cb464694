"""Heat maps and line charts as self-contained parts of a page: pictures in data addresses, paths in percent of a box.

Why pictures: 48 layers of 128 experts over a hundred logs are 600,000 cells, which no page survives as elements; as
pixels they take kilobytes. How: a cell is one pixel of a PNG whose palette runs from blue (less) over nothing at all to
red (more), so even shares show the page itself, white or dark; the page scales the pixels up. Positions are percent,
because the page stretches a box and keeps the text unstretched beside it.

Leaves out: words, and what is drawn for which question (report_page.py).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Blue and red, told apart with every common colour blindness; numbers stay readable on the strongest of them.
LESS, MORE, MISSING = (66, 140, 215), (232, 98, 56), (128, 128, 128)
_STEPS = 31  # shades on each side of even
_UNKNOWN = 2 * _STEPS + 1
_X_LABELS = 6


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Cell:
    """What a cell, or a row of cells, says: `title` when pointed at, `text` in it."""

    title: str
    text: str = ""


@dataclass(frozen=True)
class Heat:
    """A heat map: one picture, and over it a grid of `across` columns of cells that can be pointed at."""

    picture: str
    rows: int
    columns: int
    across: int
    cells: list[Cell]
    y_ticks: list[Tick] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A path of a chart; `kind` is its style."""

    kind: str
    d: str
    dots: str = ""


@dataclass(frozen=True)
class Rule:
    """A straight line across a chart, at percent from its bottom or left edge."""

    at: float
    kind: str
    label: str = ""


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Series:
    """Points of one line, in steps and values; None is a gap."""

    kind: str
    points: Sequence[tuple[float, float | None]]
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """A line or bar chart in a box of 100 by 100."""

    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    band: str = ""
    rules: list[Rule] = field(default_factory=list)
    marks: list[Rule] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """Values to percent of a box, with round values to label; `low` and `high` are its edges."""

    low: float
    high: float
    step: float

    def at(self, value: float) -> float:
        if self.high == self.low:
            return 50.0
        return min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[Tick]:
        digits = len(f"{self.step:.10f}".rstrip("0").partition(".")[2])
        count = round((self.high - self.low) / self.step)
        values = [self.low + index * self.step for index in range(count + 1)]
        return [Tick(self.at(value), f"{value + 0.0:,.{digits}f}") for value in values]


def scale_of(values: Sequence[float], *, low: float | None = None, high: float | None = None, parts: int = 4) -> Scale:
    """A scale that holds all values, with round edges; `low` and `high` widen it at least so far."""
    held = [*values, *(edge for edge in (low, high) if edge is not None)] or [0.0, 1.0]
    bottom, top = min(held), max(held)
    if top - bottom < 1e-9:
        bottom, top = (bottom - 0.5, top + 0.5) if low is None else (bottom, bottom + 1.0)
    step = 10.0 ** math.floor(math.log10((top - bottom) / parts))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (top - bottom) / (step * factor) <= parts)
    return Scale(math.floor(bottom / step + 1e-9) * step, math.ceil(top / step - 1e-9) * step, step)


def step_scale(first: int, last: int) -> Scale:
    """The steps of a run, from edge to edge."""
    return Scale(first, last, 1)


def step_ticks(scale: Scale) -> list[Tick]:
    """A few round steps; the first and the last where there is nothing between."""
    first, last = round(scale.low), round(scale.high)
    if first == last:
        return [Tick(50.0, f"{first:,}")]
    every = 1
    while (last - first) // every >= _X_LABELS:
        every = every * 2 if str(every)[0] != "2" else every * 5 // 2
    return [Tick(scale.at(step), f"{step:,}") for step in range(-(-first // every) * every, last + 1, every)]


def chart(
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    band: tuple[float, float] | None = None,
    rules: Sequence[tuple[float, str, str]] = (),
    marks: Sequence[tuple[int, str]] = (),
    labelled: bool = True,
) -> Chart:
    """Lines over the steps.

    Args:
        band: from and to which value it is shaded.
        rules: value, style and label of lines straight across.
        marks: step and text of lines straight up.
        labelled: with ticks; without, it is one of many small ones.
    """
    shaded = "" if band is None else f"M0 {_up(y, band[1])}H100V{_up(y, band[0])}H0Z"
    return Chart(
        lines=[_line(each, x, y) for each in series if any(value is not None for _, value in each.points)],
        band=shaded,
        rules=[Rule(y.at(value), kind, label) for value, kind, label in rules],
        marks=[Rule(x.at(step), "alarm", text) for step, text in marks],
        y_ticks=y.ticks() if labelled else [],
        x_ticks=step_ticks(x) if labelled else [],
    )


def bars(
    values: Sequence[float | None], titles: Sequence[str], y: Scale, rules: Sequence[tuple[float, str, str]]
) -> Chart:
    """A bar for each of some layers."""
    width = 100 / max(1, len(values))
    every = -(-len(values) // 16)
    return Chart(
        bars=[
            Bar(index * width, width, y.at(value), title)
            for index, (value, title) in enumerate(zip(values, titles, strict=True))
            if value is not None
        ],
        rules=[Rule(y.at(value), kind, label) for value, kind, label in rules],
        y_ticks=y.ticks(),
        x_ticks=[Tick((index + 0.5) * width, f"{index}") for index in range(0, len(values), every)],
    )


def heat(
    shades: Sequence[Sequence[float | None]],
    cells: Sequence[Cell],
    *,
    across: int,
    y_labels: int = 0,
    x_labels: int = 0,
) -> Heat:
    """A heat map of shades from -1 (least) over 0 (even) to 1 (most), row by row; beyond both it is clipped."""
    rows, columns = len(shades), len(shades[0])
    return Heat(
        picture(shades),
        rows,
        columns,
        across,
        list(cells),
        y_ticks=list(_numbers(rows, y_labels)),
        x_ticks=list(_numbers(columns, x_labels)),
    )


def picture(shades: Sequence[Sequence[float | None]]) -> str:
    """A PNG of one pixel a shade, as a data address; even is transparent, None is grey."""
    palette = bytearray()
    alpha = bytearray()
    for index in range(2 * _STEPS + 1):
        palette += bytes(LESS if index < _STEPS else MORE)
        alpha.append(round(255 * abs(index - _STEPS) / _STEPS))
    palette += bytes(MISSING)
    alpha.append(110)
    lines = b"".join(b"\0" + bytes(_shade(value) for value in row) for row in shades)
    header = struct.pack(">IIBBBBB", len(shades[0]), len(shades), 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"tRNS", alpha),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, bytes(content)) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def thinned(points: Sequence[tuple[float, float | None]], most: int) -> list[tuple[float, float | None]]:
    """At most so many points: neighbours become their mean, at the last one's step."""
    every = -(-len(points) // most) or 1
    thin: list[tuple[float, float | None]] = []
    for start in range(0, len(points), every):
        group = points[start : start + every]
        known = [value for _, value in group if value is not None]
        thin.append((group[-1][0], sum(known) / len(known) if known else None))
    return thin


def _shade(value: float | None) -> int:
    if value is None:
        return _UNKNOWN
    return _STEPS + round(_STEPS * max(-1.0, min(1.0, value)))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _line(series: Series, x: Scale, y: Scale) -> Line:
    """The points as a path, broken at gaps; a dot is a path of no length, which the page draws with round ends."""
    path, dots, pen = [], [], "M"
    alone = sum(value is not None for _, value in series.points) == 1
    for step, value in series.points:
        if value is None:
            pen = "M"
            continue
        here = f"{_short(x.at(step))} {_up(y, value)}"
        path.append(pen + here)
        pen = "L"
        if series.dotted or alone:
            dots.append(f"M{here}h0")
    return Line(series.kind, "".join(path), "".join(dots))


def _up(y: Scale, value: float) -> str:
    return _short(100 - y.at(value))


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _numbers(count: int, most: int) -> Iterator[Tick]:
    """Every, every 2nd, 4th ... index, at the middle of its row; none where none is wanted."""
    if most == 0:
        return
    every = 1
    while count > most * every:
        every *= 2
    for index in range(0, count, every):
        yield Tick(100 * (index + 0.5) / count, f"{index}")
