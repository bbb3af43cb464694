"""How pages look: one palette in two themes, the colours of experts, and the jinja environment of every template.

A colour is named once, here: style sheets get it as a CSS variable, figures (figures.py) as the light theme's value,
which becomes the variable again where a figure stands in a page. So a page changes with the reader's theme.

Experts have eight colours that differ by 18 (CIE76) from each other, also for protan, deutan and tritan eyes; the next
eight wear them hatched, and of more each has a hue of its own. Colour never stands alone: the number is there as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# By name: the light theme's value, and the dark one's.
PALETTE: dict[str, tuple[str, str]] = {
    "back": ("#f5f6f4", "#101412"), "card": ("#ffffff", "#191f1c"), "line": ("#e0e4e0", "#2b332f"),
    "ink": ("#1a211d", "#e7ece9"), "soft": ("#56615b", "#9ba8a1"), "track": ("#e8ece9", "#29312d"),
    "good": ("#0f6b45", "#7fdcae"), "good-back": ("#e5f4ec", "#14322a"), "good-fill": ("#2f9e6d", "#3fb283"),
    "warn": ("#8a5200", "#f2c069"), "warn-back": ("#fdf1dc", "#362a12"), "warn-fill": ("#e0a03a", "#c98a26"),
    "bad": ("#a91d2a", "#ff9aa2"), "bad-back": ("#fbe6e7", "#3d1a1e"), "bad-fill": ("#cf4553", "#d65561"),
    "blue": ("#2a6f97", "#5fa8d3"), "copy-fill": ("#8fa3b5", "#64798b"),
    "chip": ("#dfe6ea", "#2c3a44"), "chip-ink": ("#2b4454", "#b9d3e3"),
    "train": ("#0b6aa8", "#5fb0ea"), "held": ("#c2510a", "#f39a55"), "mean": ("#1a8a6a", "#4fc79b"),
    "alarm": ("#cf2233", "#ff6270"), "heat": ("1", "0.62"),
}  # fmt: skip
# Of lines that are more than a few, by Okabe and Ito; they differ in dash as well.
SERIES: dict[str, tuple[str, str]] = {
    "s0": ("#0072b2", "-"), "s1": ("#d55e00", "--"), "s2": ("#009e73", "-"), "s3": ("#cc79a7", ":"),
    "s4": ("#e69f00", "-"), "s5": ("#56b4e9", "-."), "s6": ("#8c8c00", "-"), "s7": ("#8855cc", "--"),
}  # fmt: skip
# What text itself wears: what nobody would see, and its experts.
TEXT: dict[str, tuple[str, str]] = {
    "odd": ("#6b2fa0", "#d3b0f5"), "odd-back": ("#f0e6fa", "#33224a"),
    "e0": ("#32a9ea", "#4373bf"), "e1": ("#d2835b", "#936b4a"), "e2": ("#feea99", "#595d05"),
    "e3": ("#898dae", "#2c354e"), "e4": ("#d9fdcb", "#677682"), "e5": ("#a9887e", "#4f2d08"),
    "e6": ("#2ee5ff", "#714386"), "e7": ("#9ac4bf", "#833b48"), "token": ("#141a17", "#ffffff"),
    "hatch": ("rgba(20, 26, 23, .22)", "rgba(255, 255, 255, .17)"), "hue-chroma": ("75%", "45%"),
    "hue-light": ("80%", "30%"),
}  # fmt: skip
_COLOURS = 8


@dataclass(frozen=True)
class Tile:
    """One number of a page's first screen; `fill` (0 to 1) draws it as a bar."""

    label: str
    value: str
    note: str
    fill: float | None = None
    level: Literal["", "warning", "error"] = ""


@dataclass(frozen=True)
class ExpertLook:
    """How an expert looks: a class, and the degrees of its hue where it has one of its own."""

    style: str
    hue: str


def expert_looks(experts: int) -> list[ExpertLook]:
    """How each expert looks, by its number."""
    if experts > 2 * _COLOURS:
        # The golden angle keeps neighbours far apart.
        return [ExpertLook("hue", f"{137.508 * expert % 360:.0f}") for expert in range(experts)]
    hatched = ["" if expert < _COLOURS else " hatched" for expert in range(experts)]
    return [ExpertLook(f"e{expert % _COLOURS}{hatched[expert]}", "") for expert in range(experts)]


def environment(folder: Path, *functions: Callable[..., Any], escape: bool = True) -> Environment:
    """Templates of a folder, which may include or extend those beside this file.

    Args:
        functions: what the templates call, by their own names.
        escape: whether texts are written as HTML shows them; only a template that makes no HTML does without.
    """
    made = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update({function.__name__: function for function in (*functions, variables)})
    made.filters.update({"number": "{:,}".format, "percent": lambda share: f"{100 * share:.1f}"})
    return made


def variables(theme: int, *, pages: bool = True) -> str:
    """The colours of a theme, 0 light or 1 dark, as declarations of CSS variables; without `pages`, those of text."""
    named = {**PALETTE, **TEXT} if pages else TEXT
    return " ".join(f"--{name}: {colours[theme]};" for name, colours in named.items())
