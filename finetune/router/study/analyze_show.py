"""The routing study in the terminal: tables of the first, the middle and the last layer, and text coloured by expert.

Where there is no colour, the number of a token's first expert stands behind it, small: `The₃ cat₁`. Text is never read
as markup, and characters that would move the cursor are written out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.console import Report
from finetune.data import split_unseen, visible
from finetune.router.study.analyze_page import cards, strongest_pairs, with_all

# Fifteen backgrounds of the 256 colours with black on them, told apart by lightness as well; more experts repeat them.
_COLOURS = (117, 215, 120, 211, 228, 141, 80, 250, 209, 156, 183, 222, 75, 188, 173)
_COLUMNS = 8  # experts that a table shows one by one
_PAIRS, _TEXT_TOKENS = 2, 60
_SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def show_analysis(document: Mapping[str, Any], report: Report) -> None:
    """The whole study in tables."""
    layers = document["texts"][0]["layers"]
    probe = document["probe"]
    report.line(
        f"{document['model']}: {document['layers']} layers, {document['top_k']} of {document['experts']} experts; "
        f"{probe['tokens']:,} tokens of {probe['name']} in {probe['rows']:,} rows"
    )
    for layer in layers:
        _show_load(report, document, layer)
    _show_repetition(report, document, layers)
    _show_health(report, document)
    for layer in layers:
        _show_favourites(report, document, layer)
    _show_texts(report, document)
    if document["refused_rows"]:
        report.line(f"{document['refused_rows']:,} rows of {probe['name']} could not be read and are left out.")


def _show_load(report: Report, document: Mapping[str, Any], layer: int) -> None:
    """Share of assignments; of many experts only the busiest."""
    experts = document["experts"]
    listed = [str(expert) for expert in range(experts)] if experts <= _COLUMNS else ["expert: percent, the busiest"]
    rows = []
    for domain in with_all(document):
        load = domain["layers"][layer]["load"]
        if experts <= _COLUMNS:
            shares = [f"{100 * share:.1f}" for share in load]
        else:
            busiest = sorted(enumerate(load), key=lambda pair: -pair[1])[:_COLUMNS]
            shares = ["  ".join(f"{expert}: {100 * share:.1f}" for expert, share in busiest)]
        rows.append((visible(domain["name"]), *shares, f"{domain['layers'][layer]['max_vio']:.2f}"))
    floor = max(domain["noise_floor"] for domain in document["domains"])
    title = f"Load in layer {layer}, percent ({100 / experts:.1f} is even; by chance MaxVio is {floor:.2f} or less)"
    report.table(title, ("text", *listed, "MaxVio"), rows)


def _show_repetition(report: Report, document: Mapping[str, Any], layers: Sequence[int]) -> None:
    """Our layers, then the paper's table with its own layers."""

    def row(name: str, first: Sequence[float], shared: Sequence[float]) -> tuple[str, ...]:
        return (name, *(f"{100 * share:.1f}" for share in (*first, *shared)))

    rows = []
    for domain in with_all(document):
        of_layer = [domain["layers"][layer] for layer in layers]
        first, shared = ([values[name] for values in of_layer] for name in ("repeat_first", "repeat_any"))
        rows.append(row(visible(domain["name"]), first, shared))
    random = document["random"]
    rows.append(row("random", [random["repeat_first"]] * len(layers), [random["repeat_any"]] * len(layers)))
    columns = ("text", *(f"first {layer}" for layer in layers), *(f"any {layer}" for layer in layers))
    title = f"Neighbouring tokens with the same first, or any of {document['top_k']} experts, percent, by layer"
    report.table(title, columns, rows)
    paper = document["paper"]
    columns = ("text", *(f"first {layer}" for layer in paper["layers"]), *(f"any {layer}" for layer in paper["layers"]))
    rows = [row(name, paper["first"][name], paper["any"][name]) for name in paper["first"]]
    rows.append(row("random", [paper["random"]["repeat_first"]] * 3, [paper["random"]["repeat_any"]] * 3))
    report.table(f"The same of {paper['model']}, first or any of 2 ({paper['source']})", columns, rows)


def _show_health(report: Report, document: Mapping[str, Any]) -> None:
    lifts = document["coactivation_lift"]
    rows = [
        (
            str(layer),
            f"{values['max_vio']:.2f}",
            f"{values['load_entropy']:.3f}",
            f"{values['dead_experts']}",
            f"{values['token_entropy']:.2f}",
            f"{values['top1_prob']:.2f}",
            f"{values['balance_loss']:.3f}",
            ", ".join(f"{i}+{j} {lift:.1f}" for i, j, lift in strongest_pairs(lifts[layer], top=_PAIRS) if lift > 0),
        )
        for layer, values in enumerate(document["overall"]["layers"])
    ]
    columns = (
        "layer",
        "MaxVio",
        "load entropy",
        "dead",
        "token entropy",
        "top-1",
        "balance loss",
        "pairs (times chance)",
    )
    report.table(f"By layer, all text (noise floor of MaxVio {document['overall']['noise_floor']:.2f})", columns, rows)


def _show_favourites(report: Report, document: Mapping[str, Any], layer: int) -> None:
    """Tokens and how many times as often the expert takes them; of many experts those with the strongest ones."""
    rows = [
        (
            str(card["expert"]),
            f"{100 * card['usual']:.0f}",
            "  ".join(f"{visible(token['text'])!r} {100 * token['share']:.0f}" for token in card["tokens"]),
        )
        for card in cards(document, layer, most=2 * _COLUMNS)
    ]
    report.prose_table(
        f"Favourite tokens in layer {layer}: percent of all tokens, and of a token's occurrences, that an expert takes",
        ("expert", "all", "tokens"),
        rows,
    )


# ---- coloured text --------------------------------------------------------------------------------------------------


def _show_texts(report: Report, document: Mapping[str, Any]) -> None:
    console = Console(file=sys.stderr if report.as_json else report.stdout, highlight=False, markup=False, emoji=False)
    coloured = console.color_system is not None and not console.no_color
    legend = Text("Text by first expert:")
    for expert in range(min(document["experts"], len(_COLOURS))):
        legend.append(" ").append(f" {expert} ", _style(expert))
    console.print(legend if coloured else Text("Text, the number of the first expert behind each token:"))
    for text in document["texts"]:
        for layer, first in zip(text["layers"], text["first"], strict=True):
            console.print()
            console.print(f"{text['domain']}, layer {layer}", style="bold", soft_wrap=True)
            drawn = _coloured if coloured else _numbered
            console.print(drawn(text["pieces"][:_TEXT_TOKENS], first[:_TEXT_TOKENS]), soft_wrap=True)


def _coloured(pieces: Sequence[str], first: Sequence[int]) -> Text:
    text = Text()
    for piece, expert in zip(pieces, first, strict=True):
        text.append(_written(piece), _style(expert))
    return text


def _numbered(pieces: Sequence[str], first: Sequence[int]) -> Text:
    text = Text()
    for piece, expert in zip(pieces, first, strict=True):
        text.append(_written(piece) + str(expert).translate(_SMALL))
    return text


def _written(piece: str) -> str:
    return "".join(stretch for stretch, _ in split_unseen(piece))


def _style(expert: int) -> str:
    return f"black on color({_COLOURS[expert % len(_COLOURS)]})"
