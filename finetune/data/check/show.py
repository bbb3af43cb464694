"""The data check in the terminal: the document as a few tables, and examples with the supervised tokens in colour.

Where there is no colour, supervised text stands between ⟦ and ⟧ and a control token between ‹ and ›, so that a `</s>`
that somebody typed is told from a real one there as well. Text is never read as markup, and characters that would move
the cursor or turn a line around are written out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.console import Report
from finetune.data.check.words import (
    NOTHING,
    counts,
    facts,
    leaked,
    part_of,
    positions,
    settings,
    split_unseen,
    time,
    unused,
    verdict,
    visible_document,
)

_SUPERVISED, _PROMPT = "green", "dim"  # not bright_black, which some themes make the colour of the background
_CONTROL = {True: "black on green", False: "black on white"}
_UNSEEN = "magenta"
_SPARKS = 16  # characters at most


def show_report(report: Report, document: Mapping[str, Any]) -> None:
    """The whole document in about thirty lines, and one more for each source, fault and reason."""
    document = visible_document(document)
    parts = document["parts"]
    rows: list[tuple[str, ...]] = [("rows read", *(f"{part['rows']:,}" for part in parts))]
    rows.append(("rows used", *(f"{part['used']:,} ({part_of(part['used'], part['rows'])})" for part in parts)))
    known = [[("rows not used", unused(part), False), *facts(part)] for part in parts]
    table = [(facts_of[0][0], *(value for _, value, _ in facts_of)) for facts_of in zip(*known, strict=True)]
    rows += [row for row in table if {*row[1:]} != {NOTHING}]
    rows.append(("shortest to longest", *(sparkline(part["lengths"]) for part in parts)))
    report.line(", ".join(f"{name} {value}" for name, value in settings(document)))
    report.table(f"Data of {document['recipe']}", ("what", *(part["name"] for part in parts)), rows)
    _show_sources(report, parts)
    refused = [
        (f"{reason['reason']} ({part['name']}: {positions(reason['where'], reason['rows'])})", f"{reason['rows']:,}")
        for part in parts
        for reason in part["refused"]
    ]
    if refused:
        report.table("Refused", ("reason and where", "rows"), refused)
    leakage = document["leakage"]
    if leakage is not None:
        where = f" ({positions(leakage['where'], leakage['exact'])})" if leakage["where"] else ""
        report.line(f"held-out rows that train has too: {leaked(leakage)}{where}")
    report.line("; ".join(f"{name}: {value}" for name, value in time(document["schedule"])))
    for fault in document["faults"]:
        report.line(f"{fault['level']}: {fault['what']}\n  fix: {fault['fix']}")
    says = verdict(document)
    cached = ", tokens from the cache" if document["cached"] else ""
    report.line(f"{says.headline}. {says.sentence} (checked in {document['seconds']:.1f} s{cached})")


def _show_sources(report: Report, parts: Sequence[Mapping[str, Any]]) -> None:
    sources = [(part["name"], source) for part in parts for source in part["sources"]]
    weighted = any(source["weight"] is not None for _, source in sources)
    rows = [
        (
            f"{name}: {source['where']}",
            source["form"],
            *(["" if source["weight"] is None else f"{source['weight']:g}"] if weighted else []),
            f"{source['rows']:,}",
            f"{source['refused']:,}",
        )
        for name, source in sources
    ]
    report.table("Sources", ("source", "form", *(["weight"] if weighted else []), "rows", "refused"), rows)


def show_examples(report: Report, examples: Sequence[Mapping[str, Any]]) -> None:
    """Every example with its supervised tokens marked, as it goes into training."""
    console = _console(report)
    coloured = console.color_system is not None and not console.no_color
    if coloured:
        legend = Text.assemble(
            ("learnt", _SUPERVISED), ", ", ("prompt", _PROMPT), ", ", ("control token", _CONTROL[False])
        )
    else:
        legend = Text("⟦learnt⟧, prompt, ‹control token›")
    console.print(legend, soft_wrap=True)
    for example in examples:
        said = visible_document({**example, "pieces": []})
        learnt = f"{said['supervised']:,} learnt ({part_of(said['supervised'], said['tokens'])})"
        title = f"{said['part']}: {said['where']}, {counts(said['tokens'], 'token')}, {learnt}"
        console.print()
        console.print(title, style="bold", soft_wrap=True)
        console.print(_coloured(example["pieces"]) if coloured else _marked(example["pieces"]), soft_wrap=True)


def _coloured(pieces: Sequence[Mapping[str, Any]]) -> Text:
    text = Text()
    for piece in pieces:
        ordinary = _SUPERVISED if piece["supervised"] else _PROMPT
        for stretch, unseen in split_unseen(piece["text"]):
            text.append(stretch, _CONTROL[piece["supervised"]] if piece["control"] else _UNSEEN if unseen else ordinary)
    return text


def _marked(pieces: Sequence[Mapping[str, Any]]) -> Text:
    text = Text()
    for supervised, group in groupby(pieces, key=lambda piece: bool(piece["supervised"])):
        written = "".join(
            f"‹{shown}›" if piece["control"] else shown
            for piece in group
            if (shown := "".join(stretch for stretch, _ in split_unseen(piece["text"])))
        )
        text.append(f"⟦{written}⟧" if supervised else written)
    return text


def _console(report: Report) -> Console:
    """Where the report prints its tables, for text with styles of its own."""
    return Console(file=sys.stderr if report.as_json else report.stdout, highlight=False, markup=False, emoji=False)


# ---- in short, for `finetune train` ---------------------------------------------------------------------------------


def show_short(document: Mapping[str, Any], report: Report) -> None:
    """What the rows teach, part by part; `finetune data check` shows all of it."""
    parts = document["parts"]
    rows = list(zip(*(_column(part) for part in parts), strict=True))
    table = [(cells[0][0], *(value for _, value in cells)) for cells in rows]
    report.table("Supervision", ("what", *(part["name"] for part in parts)), table)
    for fault in document["faults"]:
        if fault["level"] == "error":
            continue  # the refusal says it
        report.line(f"{fault['level']}: {fault['what']}; {fault['fix']}")


def _column(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    batches = part["batches"]
    return [
        ("conversations used", f"{part['used']:,} of {part['rows']:,}"),
        ("rows to train on", f"{part['examples']:,}"),
        ("tokens", f"{part['tokens']:,}"),
        ("supervised tokens", f"{part['supervised_tokens']:,} ({part['supervised_share']:.1%})"),
        ("turns with supervised end", f"{part['turns_with_end']:,} of {part['turns']:,}"),
        ("too long", f"{part['too_long']['rows']:,} ({part['too_long']['policy']})"),
        ("longest row", f"{part['lengths']['longest']:,} tokens"),
        (f"{batches['kind']} batches", f"{batches['efficiency']:.1%} real tokens"),
    ]


def sparkline(lengths: Mapping[str, Any]) -> str:
    """The histogram in a few characters of a terminal; only a stretch of lengths that no row has is blank."""
    rows = [each["rows"] for each in lengths["histogram"]]
    together = -(-len(rows) // _SPARKS) or 1
    heights = [sum(rows[i : i + together]) for i in range(0, len(rows), together)]
    top = max(heights, default=0)
    return "".join(" " if not height else "▁▂▃▄▅▆▇█"[min(7, 8 * height // top)] for height in heights)
