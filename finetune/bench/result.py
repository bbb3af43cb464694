"""A bench's result: a table for people, then one JSON line; the line can be appended to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.console import Report, strict_json
from finetune.errors import OutputError
from finetune.recipe import provenance


def conditions(device: torch.device) -> dict[str, Any]:
    """The device's name and memory, and the versions of the software."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": device.type if gpu is None else gpu.name,
        "device_bytes": None if gpu is None else gpu.total_memory,
        **provenance(),
    }


def require_appendable(path: Path | None) -> None:
    """Asked before minutes are spent on measuring.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        return
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise OutputError(
            f"the result cannot be written: {error.strerror}", where=f"--out {path}", fix="name a file in a folder"
        ) from None


def hand_over(document: Mapping[str, Any], report: Report, out: Path | None) -> None:
    """The JSON line, after the tables: to `out` if given, and to standard output."""
    line = json.dumps(strict_json(document), allow_nan=False)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if report.as_json:
        report.finish(document)
    else:
        report.line(line)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To `digits` significant digits, since more are noise."""
    return None if value is None else float(f"{value:.{digits}g}")
