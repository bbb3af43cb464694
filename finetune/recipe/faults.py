"""What is wrong with a recipe, before it is known where it was written.

The schema finds a fault at a dotted path; the loader knows the line of that path, or the `--set` that gave it.
A `Fault` carries the first half, `located` adds the second and makes the `FinetuneError` that the user reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune.errors import FinetuneError
from finetune.values import KeyPath, dotted

OVERRIDE = "--set "
"""How the place of a value given on the command line starts."""

# What spelling alone gets wrong: "gpu" looks like "cpu". Booleans are YAML 1.1's.
_SYNONYMS = {
    "gpu": "cuda",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    **dict.fromkeys(("yes", "on", "y"), "true"),
    **dict.fromkeys(("no", "off", "n"), "false"),
}


@dataclass(frozen=True)
class Fault:
    """One fault at one path of a recipe; the fields are those of `FinetuneError`, without the place."""

    path: KeyPath
    what: str
    allowed: str | None = None
    fix: str | None = None


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is meant or looks most like `name`, or None when none does."""
    if not isinstance(name, str):
        return None
    folded = name.lower().replace("-", "_")
    by_folded = {candidate.lower(): candidate for candidate in known}
    if _SYNONYMS.get(folded) in by_folded:
        return by_folded[_SYNONYMS[folded]]
    if len(folded) > 3:  # "adamw" is adamw_torch, not grokadamw
        for candidate, spelled in by_folded.items():
            if candidate.startswith(folded):
                return spelled
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def located(fault: Fault, places: Mapping[KeyPath, str]) -> FinetuneError:
    """The error for a fault: its place is that of its path, or of the nearest section that was written down."""
    anchor = fault.path
    while anchor not in places:
        anchor = anchor[:-1]
    where = places[anchor]
    # `--set a.b=c` names its own path already.
    if fault.path and not (anchor == fault.path and where.startswith(OVERRIDE)):
        where = f"{where}: {dotted(fault.path)}"
    return FinetuneError(fault.what, where=where, allowed=fault.allowed, fix=fault.fix)
