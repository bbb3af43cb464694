"""A document's numbers in words, the same for the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.check.words import counts, duration, share

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
