"""A figure, drawn once by matplotlib: a PNG file, pixels for a logger, or SVG inside a page.

Why SVG by the same drawing: a file, a logger and a page then show the same numbers, and a page scales, follows the
reader's theme and can be pointed at. How: colours of the palette become its CSS variables, text stays text in the
page's font, and what a place means is said by `Hint`s, which become `<title>`s above the drawing. The same figure gives
the same bytes: no date, and identifiers from its label.

Leaves out: what is drawn (router/plots.py). No display is used; settings of matplotlib are changed only while one of
these functions or a function under `styled` runs.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes as Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from finetune.report.look import PALETTE, SERIES

INK, SOFT, LINE, TRAIN, HELD, MEAN, ALARM = (
    PALETTE[name][0] for name in ("ink", "soft", "line", "train", "held", "mean", "alarm")
)
# Blue and red, told apart with every common colour blindness; numbers stay readable on the strongest of them. Between
# them nothing is drawn at all, so an even share shows the page itself, white or dark.
LESS, MORE = (66, 140, 215), (232, 98, 56)
_SHADES = 31  # on each side of even
HEAT = ListedColormap(
    [(*(c / 255 for c in (LESS if at < 0 else MORE)), abs(at) / _SHADES) for at in range(-_SHADES, _SHADES + 1)], "heat"
)
# What a part of a drawing is: an artist's gid, its class in a page.
KINDS = {"train", "held", "mean", "base", "band", "alarm", "chance", "ramp", *SERIES}
styled = matplotlib.rc_context({  # decorates a function that draws
    "figure.dpi": 150, "text.color": INK, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "axes.facecolor": "none",
    "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE, "grid.linewidth": 0.6, "axes.linewidth": 0.6,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "lines.linewidth": 1.5, "lines.markersize": 3.5, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.titlelocation": "left",
    "figure.titlesize": 11, "figure.labelsize": 9, "text.parse_math": False,
})  # fmt: skip


@dataclass(frozen=True)
class Hint:
    """What a place of a drawing means: shown when pointed at, read aloud in a `spoken` figure.

    `box` is (left, bottom, right, top) in the data's units, as far as the axes show it; None is all of the axes. `kind`
    is a class.
    """

    axes: Axes
    text: str
    box: tuple[float, float, float, float] | None = None
    kind: str = ""


@dataclass(frozen=True)
class Drawn:
    """A figure with what it is, for readers who do not see it, and its hints.

    `spoken`: a screen reader goes through the hints one by one, instead of taking the figure as one picture.
    """

    figure: Figure
    label: str
    hints: list[Hint] = field(default_factory=list)
    spoken: bool = False

    def save(self, path: str | Path) -> Path:
        """Writes a PNG, whole or not at all, and the folder where there is none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        FigureCanvasAgg(self.figure).print_png(partial)  # `savefig` would draw twice
        os.replace(partial, path)
        return path

    def pixels(self) -> np.ndarray:
        """uint8 RGB [height, width, 3]."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def svg(self) -> Markup:
        """An `<svg>` element for a page whose style sheet is base.css.jinja."""
        written = io.StringIO()
        self.figure.set_facecolor("none")  # the page is seen through it
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.label, "svg.image_inline": True}):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(self.figure).print_svg(written, metadata=nothing)
        self.figure.set_facecolor("white")
        width, height = 72 * self.figure.get_size_inches()
        opening = Markup('<svg class="drawn" viewBox="0 0 {} {}" style="--wide:{}" role="{}" aria-label="{}">').format(
            f"{width:g}", f"{height:g}", f"{width:.0f}", "group" if self.spoken else "img", self.label
        )
        hints = Markup("").join(self._hint(hint, height) for hint in self.hints)
        inside = Markup(_for_page(written.getvalue()))  # matplotlib has escaped the texts
        return opening + inside + Markup('<g class="hints">') + hints + Markup("</g></svg>")

    def _hint(self, hint: Hint, height: float) -> Markup:
        """A rectangle without a colour, in points from the top left as SVG counts."""
        if hint.box is None:
            box = hint.axes.bbox.get_points()
        else:
            shown = np.sort([hint.axes.get_xlim(), hint.axes.get_ylim()]).T
            box = hint.axes.transData.transform(np.array(hint.box).reshape(2, 2).clip(*shown))
        (left, bottom), (right, top) = np.array([box.min(0), box.max(0)]) * 72 / self.figure.dpi
        return Markup('<rect{}{} x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            Markup(' class="{}"').format(hint.kind) if hint.kind else "",
            Markup(' role="img"') if self.spoken else "",
            *(f"{value:.2f}".rstrip("0").rstrip(".") for value in (left, height - top, right - left, top - bottom)),
            hint.text,
        )


def _for_page(svg: str) -> str:
    """What lies inside matplotlib's `<svg>`, by the page's colours and fonts, with short numbers."""
    _, _, inside = svg.partition("<svg ")
    _, _, inside = inside.partition(">")
    inside = inside.rpartition("</svg>")[0]
    inside = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", inside, flags=re.S)
    inside = re.sub(r"<[^>]+>", _element, inside)
    return re.sub(r">\s+<", "><", inside)


def _element(found: re.Match[str]) -> str:
    text = re.sub(r"\s*\n", "", found[0])
    if match := re.match(r'<g id="([^"]*)"', text):
        return f'<g class="{match[1]}"' + text[match.end() :] if match[1] in KINDS else "<g" + text[match.end() :]
    if text.startswith("<image"):
        return text
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})") if light.startswith("#") else text
    text = re.sub(
        r"font-family: [^;\"]*;? ?|font: ([\d.]+px) [^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", text
    )
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    return re.sub(r"(\.\d\d)\d+", r"\1", text)
