"""The routing study as one page: loads as heat maps, repetition as curves, and text coloured by expert.

Words and positions are laid out here, the looks are in `analysis.html.jinja` and `analysis.css.jinja`.
Colour never stands alone: the number of an expert stands in the text where it changes, values are in the titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.data import split_unseen, visible
from finetune.report import Drawn, environment, expert_looks, line_panel, together
from finetune.router.plots import HeatMap, heat_maps, load_heat_map

# Of more experts than these a page shows the most telling ones: cards of favourite tokens, pairs one by one.
MAX_CARDS, MAX_PAIR_MAP = 32, 64
_LIKED = 8
_SERIES = 8  # colours of lines


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
    experts, shown = document["experts"], document["texts"][0]["layers"]
    made = environment(Path(__file__).parent, strongest_pairs, runs, cards, visible)
    return made.get_template("analysis.html.jinja").render(
        document=document,
        loads=[(domain, _load(domain)) for domain in with_all(document)],
        repetition=_repetition(document),
        pairs=[(layer, _pairs(document, layer) if experts <= MAX_PAIR_MAP else None) for layer in shown],
        shown=shown,
        looks=expert_looks(experts),
        max_pair_map=MAX_PAIR_MAP,
    )


def _load(domain: Mapping[str, Any]) -> Drawn:
    name = visible(domain["name"])
    return load_heat_map([layer["load"] for layer in domain["layers"]], title=name)


def _pairs(document: Mapping[str, Any], layer: int) -> Drawn:
    """How often two experts are chosen together, in units of chance."""
    title = f"Pairs in layer {layer}"
    return heat_maps(title, [HeatMap(title, document["coactivation_lift"][layer], (1.0, "chance"), rows="expert")])


def _repetition(document: Mapping[str, Any]) -> list[Drawn]:
    """The two shares of neighbours by layer, a line for each kind of text."""
    titles = {
        "repeat_first": "The same first expert",
        "repeat_any": f"Any of the {document['top_k']} in common",
    }
    found = []
    for name, title in titles.items():
        lines = [
            (f"s{index % _SERIES}", visible(domain["name"]), [(at, x[name]) for at, x in enumerate(domain["layers"])])
            for index, domain in enumerate(document["domains"])
        ]
        rules = [(document["random"][name], "random routing")]
        panel = partial(
            line_panel, title=title, about="share of neighbours", lines=lines, rules=rules, low=0.0, x="layer"
        )
        found.append(together([[panel]], f"{title}, by layer"))
    return found


def with_all(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The domains, and all of them together where there are several."""
    together = {"name": "all text", **document["overall"]}
    return [*document["domains"], *([together] if len(document["domains"]) > 1 else [])]


def strongest_pairs(lift: Sequence[Sequence[float | None]], *, top: int = 12) -> list[tuple[int, int, float]]:
    """The pairs that are chosen together most often beyond chance."""
    pairs = [(i, j, value) for i, row in enumerate(lift) for j, value in enumerate(row) if i < j and value is not None]
    return sorted(pairs, key=lambda pair: -pair[2])[:top]


def runs(pieces: Sequence[str], first: Sequence[int]) -> Iterator[Run]:
    """Neighbouring tokens of one first expert together."""
    for expert, group in groupby(zip(pieces, first, strict=True), key=lambda token: token[1]):
        text = "".join(piece for piece, _ in group)
        begins = len(text) - len(text.lstrip(" \n\t"))
        yield Run(expert, text[:begins], list(split_unseen(text[begins:])))


def cards(document: Mapping[str, Any], layer: int, *, most: int = MAX_CARDS) -> list[dict[str, Any]]:
    """Experts with their favourite tokens; of many experts those with the strongest favourites."""
    liked = [expert for expert in document["favourites"][layer] if expert["tokens"]]
    strongest = sorted(liked, key=lambda expert: -expert["tokens"][0]["lift"])[:most]
    return [
        {
            "expert": expert["expert"],
            "usual": document["top_k"] * document["overall"]["layers"][layer]["load"][expert["expert"]],
            "tokens": expert["tokens"][:_LIKED],
        }
        for expert in sorted(strongest, key=lambda expert: expert["expert"])
    ]
