"""How long a recipe trains: epochs, steps, and the time and cost by a speed that was measured.

The speed is that of a line which `finetune bench train --out FILE` wrote for a model of the same shape and method: of
those in `bench/results` beside the package, or in a file that is named. A speed is never guessed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.arch import MoeArch
from finetune.model import read_config
from finetune.recipe import Recipe

_RECORDED = Path(__file__).parents[2] / "bench" / "results"


@dataclass(frozen=True)
class Measured:
    """One recorded speed of training."""

    tokens_per_second: float
    tokens_per_step: int
    by: str


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
        "measured_by": None if measured is None else measured.by,
        "hours": hours,
        "cost": None if hours is None or price_per_hour is None else hours * processes * price_per_hour,
    }


def processes_of_run() -> int:
    """As torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def nearest_speed(recipe: Recipe, *, tokens_per_step: int, folder: Path = _RECORDED) -> Measured | None:
    """The recorded speed of the same shape and method, of the micro-batch nearest in size."""
    arch = MoeArch.from_config(read_config(recipe.model.path, recipe.model.revision), where=recipe.model.path)
    found = [
        Measured(
            line["trainer"]["tokens_per_second"],
            line["tokens_per_step"],
            f"{line['device']}, {line['batch']} x {line['length']} ({path.parent.name}/{path.name})",
        )
        for path, line in _lines(folder)
        if line["bench"] == "train"
        and (line["model_type"], line["parameters"], line["method"])
        == (arch.model_type, arch.total_params, recipe.trainable.method)
        and not line["overrides_budget"]
    ]
    return min(found, key=lambda m: abs(math.log(m.tokens_per_step / tokens_per_step)), default=None)


def _lines(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.json")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            line["overrides_budget"] = any("memory." in override for override in line.get("overrides", ()))
            yield path, line
