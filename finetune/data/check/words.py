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
        return Verdict("error", ", ".join(counted), "Training is refused until the faults are corrected.")
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


# ---- a document's numbers in words ----------------------------------------------------------------------------------


NOTHING = "nothing"
_MOST_KEYS = 8  # in one line


def settings(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was checked, as name and value."""
    limit = document["max_length"]
    return [
        ("model", document["model"]),
        ("template", document["template"]),
        ("loss on", document["loss_on"]),
        ("max_length", "none" if limit is None else f"{limit:,}"),
        ("packing", "on" if document["packing"] else "off"),
    ]


def flow(part: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Where the rows of a part went, as class, name and number; together they are the rows that were read."""
    dropped, held = part["too_long"]["dropped"], part["held_out"]
    refused = sum(reason["rows"] for reason in part["refused"])
    steps = [
        ("kept", "used", part["used"]),
        ("held", "held out", held),
        # Of conversations: a copy that was split has more rows.
        ("copies", "duplicates removed", part["rows"] - part["used"] - held - dropped - refused),
        ("dropped", "too long, dropped", dropped),
        ("refused", "refused", refused),
    ]
    return [step for step in steps if step[2] or step[0] == "kept"]


def unused(part: Mapping[str, Any]) -> str:
    """Why rows are not used: `101 held out, 3 refused`."""
    return ", ".join(f"{number:,} {name}" for kind, name, number in flow(part) if kind != "kept") or NOTHING


def unseen(part: Mapping[str, Any]) -> str:
    """What the rows hold besides, in one line."""
    said = [f"{entry['what']} ({counts(entry['rows'], 'row')})" for entry in part["unseen"][:_MOST_KEYS]]
    more = len(part["unseen"]) - len(said)
    return ", ".join([*said, *([f"{more:,} more"] if more else [])]) or NOTHING


def too_long(part: Mapping[str, Any]) -> str:
    """What happened to rows above `max_length`."""
    said = part["too_long"]
    if not said["rows"]:
        return "none"
    done = [f"{said[name]:,} {name}" for name in ("dropped", "truncated", "split") if said[name]]
    lost = f"; {counts(said['tokens_lost'], 'token')} lost" if said["tokens_lost"] else ""
    return f"{counts(said['rows'], 'row')} ({said['policy']}): {', '.join(done)}{lost}"


def duplicates(part: Mapping[str, Any]) -> str:
    """What was found of equal rows."""
    said = part["duplicates"]
    if not said["exact"] and not said["near"]:
        return "none" if said["near"] is not None else "none (near: not sought)"
    near = "near not sought" if said["near"] is None else f"{said['near']:,} near"
    return f"{said['exact']:,} exact, {near}; {said['removed']:,} removed"


def leaked(leakage: Mapping[str, Any]) -> str:
    """What the held-out rows share with training."""
    near = "near not sought" if leakage["near"] is None else f"{leakage['near']:,} near"
    return f"{leakage['exact']:,} exact, {near}"


def facts(part: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name and value of what else is known of a part, and whether it is a reason to look."""
    batches, lengths = part["batches"], part["lengths"]
    supervised = f"{part['supervised_tokens']:,} ({share(part['supervised_share'])})"
    ends = f"{part['turns_with_end']:,} of {part['turns']:,}"
    return [
        ("examples", f"{part['examples']:,}", not part["examples"]),
        ("tokens", f"{part['tokens']:,}", False),
        ("supervised tokens", supervised, not part["supervised_tokens"]),
        ("turns learning to end", ends, part["turns_with_end"] < part["turns"]),
        ("rows teaching nothing", f"{part['rows_unsupervised']:,}", part["rows_unsupervised"] > 0),
        ("tokens of a row", f"median {lengths['median']:,}, most {lengths['longest']:,}", False),
        ("too long", too_long(part), part["too_long"]["tokens_lost"] > 0),
        ("in the rows, but not read", unseen(part), any(entry["matters"] for entry in part["unseen"])),
        ("duplicates", duplicates(part), part["duplicates"]["exact"] > part["duplicates"]["removed"]),
        ("batches", f"{batches['rows']:,} {batches['kind']}, {share(batches['efficiency'])} full", False),
    ]


def steps(schedule: Mapping[str, Any]) -> str:
    """How long training goes on: `1,152 steps, 2 epochs`."""
    epochs = f"{schedule['epochs']:.3g}"
    return f"{counts(schedule['steps'], 'step')}, {epochs} epoch" + ("" if epochs == "1" else "s")


def elsewhere(schedule: Mapping[str, Any]) -> str:
    """Said of a time on a device that is not this machine's."""
    return "" if schedule["device_is_here"] else ", not measured on a GPU of this machine"


def time(schedule: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is known of time and cost."""
    speed, hours, cost = schedule["tokens_per_second"], schedule["hours"], schedule["cost"]
    known = [("training", steps(schedule)), ("tokens of an epoch, with padding", f"{schedule['tokens_per_epoch']:,}")]
    if speed is None:
        known.append(
            ("time", "not known: no recorded speed of this model and method (`finetune bench train` measures one)")
        )
    else:
        device = schedule["device"]
        known.append(("speed", f"{speed:,.0f} tokens/s, measured on {device} at {schedule['measured_rows']}"))
        known.append(("time", f"{duration(hours)} on {device}{elsewhere(schedule)}"))
    if cost is not None:
        known.append(("cost", f"{cost:,.2f} at the price given"))
    return known
