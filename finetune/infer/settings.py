"""The limits that an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.infer.residency import Residency

# Longer only when asked for: the pool and the rotary tables grow with it.
DEFAULT_MAX_LENGTH = 32768


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        max_batch: requests that decode at once.
        max_length: tokens of a prompt and its answer; None: the model's positions, at most 32,768.
        kv_gib: memory for keys and values; None: what all rows at full length need, or what is free (offloaded: 1/32 of
            the device).
        residency: where the experts live; see `residency.py`.
        device_gib: how much of the device may be used in all; None: what is free.
        routing: file with the load of the experts (`RUN/router/base.json`); offloaded, the hottest keep their slots.
    """

    max_batch: int = 16
    max_length: int | None = None
    kv_gib: float | None = None
    residency: Residency = "auto"
    device_gib: float | None = None
    routing: Path | None = None

    def longest(self, positions: int) -> int:
        """Tokens of the longest request, for a model of so many positions."""
        return min(self.max_length or DEFAULT_MAX_LENGTH, positions)
