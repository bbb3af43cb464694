"""The words that the page and the terminal share: the verdict, numbers, positions, and characters nobody can see.

Data may hold anything: an escape sequence that repaints a terminal, an override that reverses a line, a lone surrogate
that no file takes. Such characters are shown as Python writes them (`\\x1b`, `\\u202e`), so what is looked at is what
is there. Joiners and direction marks stay: emoji, Persian and Arabic need them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# C0 but tab and newline, DEL and C1; soft hyphen, zero-width space, line separators, bidi embeddings, overrides and
# isolates, word joiner and its kin, byte order mark, interlinear marks, lone surrogates, tag characters.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0001\U000e0020-\U000e007f]+"
)


@dataclass(frozen=True)
class Verdict:
    """What the check says in one line: `level` decides the colour."""

    level: Literal["fine", "warning", "error"]
    headline: str
    sentence: str


def verdict(document: Mapping[str, Any]) -> Verdict:
    errors = sum(fault["level"] == "error" for fault in document["faults"])
    warnings = sum(fault["level"] == "warning" for fault in document["faults"])
    counted = [counts(number, name) for number, name in ((errors, "fault"), (warnings, "warning")) if number]
    if errors:
        return Verdict("error", ", ".join(counted), "Training is refused until the faults are mended.")
    if warnings:
        return Verdict("warning", ", ".join(counted), "Training would start. Look at this first.")
    return Verdict("fine", "The data is fine", "Nothing stands in the way of training.")


def counts(number: int, name: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def compact(number: int) -> str:
    """Three figures of a large number, every digit of one below 100,000."""
    for size, sign in ((10**9, "B"), (10**6, "M"), (10**5, "k")):
        if number >= size:
            scaled = number / (1000 if sign == "k" else size)
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {sign}"
    return f"{number:,}"


def share(value: float) -> str:
    """A share as percent; only a whole is 100%, and only nothing is 0%."""
    if value in (0.0, 1.0):
        return f"{value:.0%}"
    return "<0.1%" if value < 0.001 else f"{min(value, 0.999):.1%}"


def part_of(some: int, whole: int) -> str:
    return share(some / whole) if whole else "0%"


def duration(hours: float) -> str:
    """The two largest units of a time: `2 d 4 h`, `3 h 12 min`, `8 min`, `40 s`."""
    seconds = round(hours * 3600)
    if seconds < 60:
        return f"{seconds} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def positions(where: Sequence[str], total: int) -> str:
    """`train.jsonl line 3, 8 · b.jsonl line 4 and 12 more`, from places whose last word is the number."""
    groups = itertools.groupby((place.rpartition(" ") for place in where), key=lambda place: place[0])
    text = " · ".join(f"{name} {', '.join(place[2] for place in places)}".strip() for name, places in groups)
    return text if total <= len(where) else f"{text} and {total - len(where):,} more"


def split_unseen(text: str) -> Iterator[tuple[str, bool]]:
    """The text in stretches, each with whether it stands for characters that nobody would see."""
    end = 0
    for match in _UNSEEN.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], False
        yield match.group().encode("unicode_escape").decode("ascii"), True
        end = match.end()
    if end < len(text):
        yield text[end:], False


def visible(text: str) -> str:
    """The text with unseen characters written out."""
    return "".join(stretch for stretch, _ in split_unseen(text))


def visible_document(value: Any) -> Any:
    """Strict JSON with every text visible and on one line."""
    if isinstance(value, Mapping):
        return {key: visible_document(item) for key, item in value.items()}
    if isinstance(value, list):
        return [visible_document(item) for item in value]
    if isinstance(value, str):
        return visible(value).replace("\n", "\\n")
    return value
