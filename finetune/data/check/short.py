"""The report on the data as `finetune train` shows it: one table, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.console import Report


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
