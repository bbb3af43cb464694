"""How long a recipe trains: epochs, steps, and the time and cost by a speed that was measured.

The speeds are those that `finetune bench train` measured, a line each in `speeds.json`, which a test compares with
`bench/results`; one of the same shape and method counts, and one of the GPU at hand before others. A speed is never
guessed, and is never given without the name of the device that it is of.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.moe import MoeArch, read_config
from finetune.recipe import Recipe

_RECORDED = Path(__file__).parent / "speeds.json"


@dataclass(frozen=True)
class Measured:
    """One recorded speed of training."""

    tokens_per_second: float
    tokens_per_step: int
    device: str
    rows: str  # micro-batch and length
    here: bool  # whether it is of the GPU of this machine


def schedule(
    recipe: Recipe, *, batches: int, tokens_per_epoch: int, price_per_hour: float | None = None
) -> dict[str, Any]:
    """Epochs and steps; time and cost where a speed is known.

    Args:
        batches: micro-batches of an epoch, of one process.
        tokens_per_epoch: what an epoch computes, padding included, as the bench counts.
        price_per_hour: of one device.
    """
    training = recipe.training
    batch, processes = training.get("per_device_train_batch_size", 8), processes_of_run()
    per_epoch = max(1, math.ceil(batches / training.get("gradient_accumulation_steps", 1)))
    limit = training.get("max_steps", -1)
    steps = limit if limit > 0 else math.ceil(training.get("num_train_epochs", 3) * per_epoch)
    epochs = steps / per_epoch
    budget = recipe.data.tokens_per_batch
    measured = nearest_speed(recipe, tokens_per_step=budget or batch * (training.get("max_length") or 1024))
    hours = None
    if measured is not None:
        hours = epochs * tokens_per_epoch / (measured.tokens_per_second * processes) / 3600
    return {
        "epochs": epochs,
        "steps": steps,
        "tokens_per_epoch": tokens_per_epoch,
        "tokens_per_second": None if measured is None else measured.tokens_per_second,
        "device": None if measured is None else measured.device,
        "device_is_here": None if measured is None else measured.here,
        "measured_rows": None if measured is None else measured.rows,
        "hours": hours,
        "cost": None if hours is None or price_per_hour is None else hours * processes * price_per_hour,
    }


def processes_of_run() -> int:
    """As torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def nearest_speed(recipe: Recipe, *, tokens_per_step: int, recorded: Path = _RECORDED) -> Measured | None:
    """The recorded speed of the same shape and method: of this machine's GPU where there is one, then of the
    micro-batch nearest in size."""
    arch = MoeArch.from_config(read_config(recipe.model.path, recipe.model.revision), where=recipe.model.path)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    wanted = (arch.model_type, arch.total_params, recipe.trainable.method)
    found = [
        Measured(
            line["tokens_per_second"],
            line["tokens_per_step"],
            line["device"],
            f"{line['batch']} x {line['length']} tokens",
            line["device"] == here,
        )
        for line in json.loads(recorded.read_text(encoding="utf-8"))
        if (line["model_type"], line["parameters"], line["method"]) == wanted
    ]
    return min(found, key=lambda m: (not m.here, abs(math.log(m.tokens_per_step / tokens_per_step))), default=None)
