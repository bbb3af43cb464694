"""The routing study as one page: loads as heat maps, repetition as curves, and text coloured by expert.

The page carries its style and drawings and asks nothing of the network; its content security policy forbids scripts and
requests. Words and positions are laid out here, the looks are in `analysis.html.jinja` and `analysis.css.jinja`.
Colour never stands alone: the number of an expert stands in the text where it changes, values are in the titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.data import split_unseen, visible
from finetune.report import environment

# Of more experts than these a page shows the most telling ones: cards of favourite tokens, pairs one by one.
MAX_CARDS, MAX_PAIR_MAP = 32, 64
_LIKED = 8
_DOMAIN_COLOURS = 8


@dataclass(frozen=True)
class Cell:
    """A square of a heat map: `strength` 0 is even, 1 is twice as much, or nothing, and `over` says which."""

    x: int
    y: int
    strength: float
    over: bool
    title: str


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one first expert.

    `space` is what the text begins with, so that the expert's number can stand beside the first letter; `stretches` is
    the rest, each with whether nobody would see it.
    """

    expert: int
    space: str
    stretches: list[tuple[str, bool]]


def render_analysis(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page of the document of `finetune router analyze`, to be written as UTF-8."""
    functions = (load_cells, pair_cells, strongest_pairs, curve, runs, cards, visible)
    made = environment(Path(__file__).parent, *functions)
    return made.get_template("analysis.html.jinja").render(
        document=document,
        texts=with_all(document),
        shown=document["texts"][0]["layers"],
        hues=[expert_hue(expert, document["experts"]) for expert in range(document["experts"])],
        top_repetition=_top_repetition(document),
        domain_colours=_DOMAIN_COLOURS,
        max_pair_map=MAX_PAIR_MAP,
    )


def with_all(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The domains, and all of them together where there are several."""
    together = {"name": "all text", **document["overall"]}
    return [*document["domains"], *([together] if len(document["domains"]) > 1 else [])]


def load_cells(domain: Mapping[str, Any]) -> list[Cell]:
    """A domain's load, layer by expert, in units of an even share."""
    return [
        _cell(expert, layer, share * len(values["load"]), f"layer {layer}, expert {expert}: {100 * share:.1f}%")
        for layer, values in enumerate(domain["layers"])
        for expert, share in enumerate(values["load"])
    ]


def pair_cells(lift: Sequence[Sequence[float | None]]) -> list[Cell]:
    """How often pairs are chosen together, in units of chance; none on the diagonal."""
    return [
        _cell(j, i, value, f"experts {i} and {j}: {value:.2f} times chance")
        for i, row in enumerate(lift)
        for j, value in enumerate(row)
        if value is not None
    ]


def strongest_pairs(lift: Sequence[Sequence[float | None]], *, top: int = 12) -> list[tuple[int, int, float]]:
    """The pairs that are chosen together most often beyond chance."""
    pairs = [(i, j, value) for i, row in enumerate(lift) for j, value in enumerate(row) if i < j and value is not None]
    return sorted(pairs, key=lambda pair: -pair[2])[:top]


def curve(domain: Mapping[str, Any], name: str, top: float) -> str:
    """Points of a polyline over the layers in a box of 100 by 100; `top` is the value at its upper edge."""
    layers = domain["layers"]
    width = max(len(layers) - 1, 1)
    points = ((100 * i / width, 100 * (1 - values[name] / top)) for i, values in enumerate(layers))
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def runs(pieces: Sequence[str], first: Sequence[int]) -> Iterator[Run]:
    """Neighbouring tokens of one first expert together."""
    for expert, group in groupby(zip(pieces, first, strict=True), key=lambda token: token[1]):
        text = "".join(piece for piece, _ in group)
        begins = len(text) - len(text.lstrip(" \n\t"))
        yield Run(expert, text[:begins], list(split_unseen(text[begins:])))


def cards(document: Mapping[str, Any], layer: int) -> list[dict[str, Any]]:
    """Experts with their favourite tokens; of many experts those with the strongest favourites."""
    liked = [expert for expert in document["favourites"][layer] if expert["tokens"]]
    strongest = sorted(liked, key=lambda expert: -expert["tokens"][0]["lift"])[:MAX_CARDS]
    return [
        {
            "expert": expert["expert"],
            "usual": document["top_k"] * document["overall"]["layers"][layer]["load"][expert["expert"]],
            "tokens": expert["tokens"][:_LIKED],
        }
        for expert in sorted(strongest, key=lambda expert: expert["expert"])
    ]


def expert_hue(expert: int, experts: int) -> tuple[int, int]:
    """Hue in degrees, evenly around the circle, and in turn one of two lightnesses, so that neighbours differ."""
    return round(360 * expert / experts), expert % 2


def _cell(x: int, y: int, utilization: float, title: str) -> Cell:
    return Cell(x, y, round(min(abs(utilization - 1.0), 1.0), 3), utilization > 1.0, title)


def _top_repetition(document: Mapping[str, Any]) -> dict[str, float]:
    """Upper edge of the two drawings, a full tenth above all values."""
    found = {}
    for name in ("repeat_first", "repeat_any"):
        largest = max(values[name] for domain in document["domains"] for values in domain["layers"])
        found[name] = min(1.0, (int(10 * max(largest, document["random"][name])) + 1) / 10)
    return found
