"""The data check as one page: what the document says, drawn, and examples with the learnt tokens coloured.

The words are laid out here, the looks are in `check.html.jinja`, `check.css.jinja` and the templates of
`finetune.report`. The page asks nothing of the network and runs nothing, whatever a text says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from finetune.data.check.histogram import histogram_of
from finetune.data.check.words import (
    compact,
    counts,
    duration,
    elsewhere,
    facts,
    flow,
    leaked,
    part_of,
    positions,
    settings,
    share,
    split_unseen,
    steps,
    time,
    verdict,
    visible_document,
)
from finetune.report import Tile, environment


@dataclass(frozen=True)
class Stretch:
    """A part of an example's text: ordinary, a control token, or characters that nobody would see."""

    text: str
    kind: Literal["plain", "control", "unseen"]


def render_page(document: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page of the check's document and of examples, to be written as UTF-8.

    Args:
        document: what `finetune data check --json` prints.
        examples: encoded rows; consecutive `pieces` make up the text, and each is learnt or not.
    """
    clean = visible_document(document)
    return (
        environment(Path(__file__).parent, flow, facts, leaked, time, histogram_of, positions, counts, part_of)
        .get_template("check.html.jinja")
        .render(
            document=clean,
            verdict=verdict(clean),
            settings=settings(clean),
            tiles=tiles(clean),
            examples=[
                {**visible_document({**row, "pieces": []}), "runs": list(_runs(row["pieces"]))} for row in examples
            ],
        )
    )


def tiles(document: Mapping[str, Any]) -> list[Tile]:
    """The numbers of the first screen: those of the training rows."""
    train, schedule = document["parts"][0], document["schedule"]
    batches, hours, speed = train["batches"], schedule["hours"], schedule["tokens_per_second"]
    pace = "; speed not measured"
    if speed is not None:
        pace = f" at {speed:,.0f} tokens/s on {schedule['device']}{elsewhere(schedule)}"
    cost = "" if schedule["cost"] is None else f"; cost {schedule['cost']:,.2f}"
    ends = train["turns_with_end"] / train["turns"] if train["turns"] else 0.0
    return [
        Tile(
            "rows used",
            f"{train['used']:,}",
            f"of {counts(train['rows'], 'row')} ({part_of(train['used'], train['rows'])})",
            train["used"] / train["rows"] if train["rows"] else 0.0,
            "" if train["used"] else "error",
        ),
        Tile(
            "tokens",
            compact(train["tokens"]),
            f"in {counts(train['examples'], 'example')}; the longest row has {train['lengths']['longest']:,}",
        ),
        Tile(
            "supervised",
            share(train["supervised_share"]),
            f"{train['supervised_tokens']:,} tokens are learnt",
            train["supervised_share"],
            "" if train["supervised_tokens"] else "error",
        ),
        Tile(
            "turns with end",
            part_of(train["turns_with_end"], train["turns"]),
            f"{train['turns_with_end']:,} of {counts(train['turns'], 'turn')} learn where to stop",
            ends,
            "" if ends == 1 else "warning",
        ),
        Tile(
            "packing efficiency" if batches["kind"] == "packed" else "batch efficiency",
            share(batches["efficiency"]),
            f"{counts(batches['rows'], 'row')}, {batches['kind']}; the rest is padding",
            batches["efficiency"],
        ),
        Tile("time", "—" if hours is None else duration(hours), f"{steps(schedule)}{pace}{cost}"),
    ]


def _runs(pieces: Sequence[Mapping[str, Any]]) -> Iterator[tuple[bool, list[Stretch]]]:
    """Neighbouring pieces that are learnt, or are not, together."""
    for supervised, group in groupby(pieces, key=lambda piece: bool(piece["supervised"])):
        yield supervised, [stretch for piece in group for stretch in _stretches(piece)]


def _stretches(piece: Mapping[str, Any]) -> Iterator[Stretch]:
    for text, unseen in split_unseen(piece["text"]):
        yield Stretch(text, "control" if piece["control"] else "unseen" if unseen else "plain")
