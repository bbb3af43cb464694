"""What a recipe's data teaches, counted: one JSON document for the terminal, the page and programs.

Counts are over the rows that train, after lengths, duplicates and the held-out part; batches are the mixture's. Faults
are what a user must know: an error makes training meaningless, and `finetune train` refuses; a warning is said. Time
and cost go by the speeds that `finetune bench train` measured, a line each in `speeds.json`, which a test compares with
`bench/results`; one of the same shape and method counts, and one of the GPU at hand before others. A speed is never
guessed, and is never given without the name of its device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from finetune.data.batching import TokenBudgetBatches, padding_efficiency, row_lengths
from finetune.data.forms import advice, danger, matters
from finetune.data.pipeline import Ledger
from finetune.data.prepare import Part, PreparedData, max_length_of
from finetune.data.worker import Lengths
from finetune.errors import DataError
from finetune.moe import MoeArch, read_config
from finetune.recipe import Recipe

_BINS = 24
_SHOWN = 8
_FEW_SUPERVISED = 0.02  # below this share, nearly all of a step's time goes to tokens that are not supervised
_ENDS = (
    "set data.template to one that writes the tokenizer's eos_token after every answer, or set eos_token in "
    "tokenizer_config.json to the token that the template writes there"
)
_UNCUT = "set data.too_long: truncate, drop or split"


def document(
    recipe: Recipe,
    prepared: PreparedData,
    *,
    name: str = "",
    template: str,
    seconds: float = 0,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """The report.

    Args:
        name: what the recipe is called, its file for example.
        template: the one in use, with `auto` resolved.
        seconds: what preparing took.
        price_per_hour: of the device, for the cost.
    """
    parts = [
        _describe(part, rows, recipe)
        for part, rows in zip(prepared.parts, (prepared.train, prepared.held_out), strict=False)
        if rows is not None
    ]
    leakage = None
    if prepared.held_out is not None:
        leaked = prepared.leaked_rows
        leakage = {"exact": len(leaked), "near": prepared.near_leaks, "where": leaked[:_SHOWN]}
    made = {
        "recipe": name,
        "model": _shown(recipe.model.path),
        "template": template,
        "loss_on": recipe.data.loss_on,
        "max_length": max_length_of(recipe),
        "packing": bool(recipe.training.get("packing")),
        "parts": parts,
        "leakage": leakage,
        "schedule": schedule(
            recipe,
            batches=parts[0]["batches"]["batches"],
            tokens_per_epoch=parts[0]["batches"]["tokens"],
            price_per_hour=price_per_hour,
        ),
        "seconds": round(seconds, 2),
        "cached": prepared.cached,
    }
    return made | {"faults": faults(made, max_refused=recipe.data.max_refused)}


def faults(document: dict[str, Any], *, max_refused: float) -> list[dict[str, str]]:
    """What is wrong with the data, the worst first."""
    limit = document["max_length"]
    told = [fault for part in document["parts"] for fault in _faults_of(part, max_refused, limit)]
    told += _leakage_faults(document)
    found = [{"level": level, "what": what, "fix": fix} for level, what, fix in told]
    return sorted(found, key=lambda fault: fault["level"])


Fault = tuple[Literal["error", "warning"], str, str]  # level, what, fix


def _faults_of(part: dict[str, Any], max_refused: float, limit: int | None) -> Iterator[Fault]:
    name, rows, refused = part["name"], part["rows"], sum(reason["rows"] for reason in part["refused"])
    dropped, truncated = part["too_long"]["dropped"], part["too_long"]["truncated"]
    above = f"longer than training.max_length {limit}"
    if refused > max_refused * rows:
        first = part["refused"][0]
        what = f"the first: {first['reason']} ({', '.join(first['where'][:3])})"
        fix = "correct them, let `finetune data check RECIPE --fix DIR` write what can be corrected, or raise "
        yield "error", f"{name}: {refused:,} of {rows:,} rows cannot be used, {what}", f"{fix}data.max_refused"
    elif refused:
        yield "warning", f"{name}: {refused:,} of {rows:,} rows are left out", "see the reasons in the table"
    if part["examples"] == 0:
        if refused < rows:
            what = f"{name}: no conversation is left" + (f"; {dropped:,} are {above}" if dropped else "")
            yield "error", what, "raise training.max_length, or give other data"
        return
    if part["supervised_tokens"] == 0:
        what = f"{name}: not one of {part['tokens']:,} tokens is supervised"
        yield "error", what, "give conversations with assistant turns, and check data.template and data.loss_on"
    elif part["turns_with_end"] == 0:
        what = f"{name}: no supervised turn ends with the end of sequence, so the model would never learn to stop"
        yield "error", what, f"{_UNCUT}, or {_ENDS}" if truncated else _ENDS
    elif part["turns_with_end"] < part["turns"]:
        missing = f"{part['turns'] - part['turns_with_end']:,} of {part['turns']:,}"
        what = f"{name}: {missing} supervised turns do not end with the end of sequence"
        yield "warning", what, _UNCUT if truncated else _ENDS
    for unseen in [entry for entry in part["unseen"] if entry["matters"]][:_SHOWN]:
        what, where = unseen["what"], ", ".join(unseen["where"][:3])
        has = f"{unseen['rows']:,} of {rows:,} rows have it, and {danger(what)} ({where})"
        yield "warning", f"{name}: {what}: {has}", advice(what)
    if 0 < part["supervised_share"] < _FEW_SUPERVISED:
        yield "warning", f"{name}: only {part['supervised_share']:.1%} of the tokens are supervised", "shorten prompts"
    if dropped:
        yield "warning", f"{name}: {dropped:,} conversations are {above}", "raise training.max_length"
    if name == "train" and part["duplicates"]["removed"] == 0 and part["duplicates"]["exact"] > 0:
        what = f"{name}: {part['duplicates']['exact']:,} conversations are in it more than once"
        yield "warning", what, "set data.deduplicate: exact"


def _leakage_faults(document: dict[str, Any]) -> Iterator[Fault]:
    leakage = document["leakage"]
    if not leakage or not leakage["exact"]:
        return
    held_out = document["parts"][1]["used"]
    what = f"{leakage['exact']:,} of {held_out:,} held-out conversations are in train too"
    if leakage["exact"] == held_out:
        yield "warning", f"{what}: evaluation measures memory", "give other data.eval, or set data.eval_fraction"
    else:
        yield "warning", f"{what} ({', '.join(leakage['where'][:3])})", "take them out of one of the two"


def require_sound(document: dict[str, Any]) -> None:
    """Refuses data that make training meaningless.

    Raises:
        DataError: with every such fault.
    """
    errors = [fault for fault in document["faults"] if fault["level"] == "error"]
    if errors:
        raise DataError(
            "; ".join(error["what"] for error in errors),
            where=document["parts"][0]["sources"][0]["where"],
            fix="; ".join(dict.fromkeys(error["fix"] for error in errors))
            + "; `finetune data check RECIPE` shows all of it",
        )


def _describe(part: Part, final: Dataset, recipe: Recipe) -> dict[str, Any]:
    tokens, supervised = part.column("tokens"), part.column("supervised")
    turns, ended = part.column("turns"), part.column("turns_with_end")
    # What was drawn from another part has no rows of its own: those that cannot be used are told there.
    ledgers = [] if part.drawn else part.ledgers
    lengths = sum((ledger.lengths for ledger in ledgers), Lengths())
    used = part.conversations()
    total = int(tokens.sum())
    return {
        "name": part.name,
        "sources": [
            {
                "where": _shown(ledger.where),
                "form": ledger.form,
                "weight": weight,
                "rows": ledger.rows,
                "used": of_source,
                "refused": ledger.rows - ledger.used,
            }
            for ledger, weight, of_source in zip(ledgers, part.weights, used, strict=False)
        ],
        "fingerprint": part.fingerprint(),
        "rows": sum(used) if part.drawn else sum(ledger.rows for ledger in ledgers),
        "used": sum(used),
        "refused": [{"reason": entry.pop("what"), **entry} for entry in _places(ledgers, "refused")],
        "unseen": [{**entry, "matters": matters(entry["what"])} for entry in _places(ledgers, "unseen")],
        "held_out": part.given,
        "duplicates": {"exact": part.exact, "near": part.near, "removed": part.removed},
        "too_long": {
            "policy": recipe.data.too_long,
            "rows": lengths.rows,
            "dropped": lengths.dropped,
            "truncated": lengths.truncated,
            "split": lengths.split,
            "tokens_lost": lengths.tokens_lost,
        },
        "examples": len(tokens),
        "tokens": total,
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / total) if total else 0.0,
        "turns": int(turns.sum()),
        "turns_with_end": int(ended.sum()),
        "rows_unsupervised": int((supervised == 0).sum()),
        "lengths": {
            "longest": int(tokens.max(initial=0)),
            "median": int(np.median(tokens)) if len(tokens) else 0,
            "histogram": _histogram(tokens),
        },
        "batches": _batches(final, recipe, held_out=part.name != "train"),
    }


def _shown(path: str) -> str:
    """Relative to the working directory where it lies below it, as one would write it."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _places(ledgers: list[Ledger], group: Literal["refused", "unseen"]) -> list[dict[str, Any]]:
    """What the ledgers counted, over all of them, the most first."""
    found: dict[str, dict[str, Any]] = {}
    for ledger in ledgers:
        for what, places in (ledger.refused if group == "refused" else ledger.unseen).items():
            entry = found.setdefault(what, {"what": what, "rows": 0, "where": []})
            entry["rows"] += places.rows
            entry["where"] += [ledger.at(p) for p in places.positions][: _SHOWN - len(entry["where"])]
    return sorted(found.values(), key=lambda entry: -entry["rows"])


def _histogram(tokens: np.ndarray) -> list[dict[str, int]]:
    if not len(tokens):
        return []
    width = -(-int(tokens.max() + 1) // _BINS)
    counts = np.bincount(tokens // width)
    return [{"from": i * width, "to": (i + 1) * width, "rows": int(count)} for i, count in enumerate(counts)]


def _batches(final: Dataset, recipe: Recipe, *, held_out: bool) -> dict[str, Any]:
    """How rows become batches: kind, rows (packed ones), batches of one process, tokens with padding, real ones' share.

    In a mixture the rows of a small set may come again; they are counted here as often as they come.
    """
    training, lengths = recipe.training, row_lengths(final)
    name = "per_device_eval_batch_size" if held_out else "per_device_train_batch_size"
    size, processes = training.get(name, 8), 1 if held_out else processes_of_run()
    budget = None if held_out else recipe.data.tokens_per_batch
    kind, batches, efficiency = "padded", math.ceil(len(final) / (size * processes)), 0.0
    if "seq_lengths" in final.column_names:
        max_length = max_length_of(recipe)
        assert max_length is not None, "packing has a length"
        kind, efficiency = "packed", float(lengths.sum() / max(len(final) * max_length, 1))
    elif len(final):
        efficiency = padding_efficiency(
            lengths,
            batch_size=size,
            grouped=training.get("train_sampling_strategy") == "group_by_length" and not held_out,
            accumulation=training.get("gradient_accumulation_steps", 1),
            budget=budget,
            seed=training.get("seed", 42),
        )
        if budget is not None:
            kind, batches = "token budget", len(TokenBudgetBatches(lengths, budget, processes=processes))
    return {
        "kind": kind,
        "rows": len(final),
        "batches": batches,
        "tokens": round(lengths.sum() / efficiency) if efficiency else 0,
        "efficiency": efficiency,
    }


# ---- how long it trains ---------------------------------------------------------------------------------------------


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
