"""What to change when a run does not fit: what each change alone comes to, and the first set of them that fits.

Why: a list of single changes leaves the user to find out which of them are enough together. How: the changes are tried
from harmless to costly, one on top of the other, by the estimate itself; those that turn out not to be needed are taken
back, and the micro-batch grows again as far as there is room. The effective batch stays: what the micro-batch loses,
accumulation gets. Leaves out: sharding, other models.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.memory.run import GIB, Run
from finetune.memory.static import optimizer_states

Total = Callable[[Run], int]
# Smaller is not advised: rank, tokens of a row.
LEAST_RANK, LEAST_ROW = 8, 256
# GB on the label: GiB that CUDA reports on such a card (RTX 3060, A4000, RTX 4090, RTX 5090, A100, L40S, A100, H100
# NVL, H200, B200).
CARDS = {12: 11.6, 16: 15.6, 24: 23.5, 32: 31.3, 40: 39.4, 48: 44.4, 80: 79.1, 96: 93.1, 141: 139.8, 180: 178.3}
# A single change that saves less than this share of the device is not worth a line.
WORTH = 0.01


@dataclass(frozen=True)
class Change:
    """Keys of the recipe with their new values, and the fields of the run that follow."""

    keys: Mapping[str, str | int | float]
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        return "set " + " with ".join(f"{key}: {value}" for key, value in self.keys.items())


AUTO = Change({"training.gradient_checkpointing": "auto"}, {"keep_attention": 0, "keep_gate_up": 0})


@dataclass(frozen=True)
class Advice:
    """Lines for single changes; the overrides (`key=value`) that together make the run fit, none where nothing does;
    and one line that says the latter with its bytes."""

    lines: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    what_fits: str = ""


def advise(run: Run, device_bytes: int, total: Total) -> Advice:
    """For a run that does not fit; `total` says how many bytes a run needs."""
    lines: list[str] = []

    def propose(text: str, changed: Run) -> None:
        needed = total(changed)
        if total(run) - needed >= WORTH * device_bytes:
            outcome = "fits" if needed <= device_bytes else "not enough alone"
            lines.append(f"{text}: {needed / GIB:.2f} GiB, {outcome}")

    if run.keep_attention or run.keep_gate_up:
        propose(str(AUTO), _changed(run, AUTO))
    if run.micro_batch > 1:
        batch = _batch(run, _largest_batch(run, device_bytes, total) or 1)
        key, size = "training.per_device_train_batch_size", batch.fields["micro_batch"]
        propose(f"set {key}: {size}, and more training.gradient_accumulation_steps", _changed(run, batch))
    for levels in _changes(run):
        fitting = (change for change in levels if total(_changed(run, change)) <= device_bytes)
        change = next(fitting, levels[-1])
        propose(str(change), _changed(run, change))
    made = _what_fits(run, device_bytes, total)
    if made is None:
        strongest = [levels[-1] for levels in _changes(run)]
        least = min(total(_changed(run, AUTO, *strongest, batch)) for batch in _batches(run))
        nothing = f"nothing of this model fits into {device_bytes / GIB:.2f} GiB; the least is {least / GIB:.2f} GiB"
        return Advice(tuple(lines), what_fits=nothing if run.device == "cpu" else f"{nothing}: {_card(least)}")
    overrides = tuple(f"{key}={value}" for change in made for key, value in change.keys.items())
    settings = " ".join(f"--set {override}" for override in overrides)
    return Advice(tuple(lines), overrides, f"{settings} ({total(_changed(run, *made)) / GIB:.2f} GiB)")


def _changes(run: Run) -> Iterator[list[Change]]:
    """Besides the micro-batch and checkpointing; from harmless to costly, each with its levels, the strongest last."""
    if run.backend == "grouped":
        yield [Change({"model.experts_backend": "loop"}, {"backend": "loop"})]
    if optimizer_states(run.optimizer)[1] == 32:
        name = "paged_adamw_8bit" if run.device == "cuda" else "adamw_8bit"
        yield [Change({"training.optim": name}, {"optimizer": name})]
    lora = run.method == "attention_lora"
    if lora and run.attention_storage == "16bit":
        yield [Change({"quantization.attention": "nf4"}, {"attention_storage": "nf4"})]
    if lora and run.lora_dropout:
        yield [Change({"trainable.lora.dropout": 0}, {"lora_dropout": False})]
    if lora and run.use_dora:
        yield [Change({"trainable.lora.use_dora": "false"}, {"use_dora": False})]
    if lora and (ranks := _halved(run.lora_r, LEAST_RANK)):
        yield [Change({"trainable.lora.r": r, "trainable.lora.alpha": _alpha(run, r)}, {"lora_r": r}) for r in ranks]
    if rows := _halved(run.seq_len, LEAST_ROW):
        yield [Change({"training.max_length": row}, {"seq_len": row}) for row in rows]
    if not lora:
        keys = {"trainable.method": "attention_lora", "quantization.attention": "nf4"}
        yield [Change(keys, {"method": "attention_lora", "attention_storage": "nf4"})]


def _alpha(run: Run, rank: int) -> int:
    """So that alpha / rank stays."""
    return max(1, run.lora_alpha * rank // run.lora_r)


def _halved(value: int, least: int) -> list[int]:
    """Half of it, a quarter, and so on, none below `least`."""
    return [value // 2**halvings for halvings in range(1, value.bit_length()) if value // 2**halvings >= least]


def _batch(run: Run, micro_batch: int) -> Change:
    """At most this micro-batch: the largest that keeps the effective batch by accumulation."""
    effective = run.micro_batch * run.accumulation
    micro_batch = next(size for size in range(micro_batch, 0, -1) if effective % size == 0)
    if micro_batch == run.micro_batch:
        return Change({}, {"micro_batch": micro_batch})
    steps = effective // micro_batch
    keys = {"training.per_device_train_batch_size": micro_batch, "training.gradient_accumulation_steps": steps}
    return Change(keys, {"micro_batch": micro_batch, "accumulation": steps})


def _batches(run: Run) -> tuple[Change, Change]:
    """As it is, and one by one. Either may need less: accumulation holds the gradients of all that trains."""
    return _batch(run, run.micro_batch), _batch(run, 1)


def _changed(run: Run, *changes: Change) -> Run:
    fields: dict[str, Any] = {}
    for change in changes:
        fields |= change.fields
    return replace(run, **fields)


def _largest_batch(run: Run, device_bytes: int, total: Total) -> int:
    """The largest micro-batch, at most the run's own, that fits with the accumulation that it then needs; 0: none."""

    def too_large(size: int) -> bool:
        accumulation = math.ceil(run.micro_batch * run.accumulation / size)
        return total(replace(run, micro_batch=size, accumulation=accumulation)) > device_bytes

    return bisect_left(range(1, run.micro_batch + 1), True, key=too_large)


def _what_fits(run: Run, device_bytes: int, total: Total) -> list[Change] | None:
    """The least costly changes with which the run fits, by the order of `_changes`."""

    def fits(made: list[Change]) -> bool:
        return any(total(_changed(run, *made, batch)) <= device_bytes for batch in _batches(run))

    # Full checkpointing is no price: `auto` recomputes no more than it must.
    needed = [AUTO] if run.keep_attention or run.keep_gate_up else []
    made = list(needed)
    for levels in _changes(run):
        if fits(made):
            break
        made.append(next((level for level in levels if fits([*made, level])), levels[-1]))
    if not fits(made):
        return None
    # The last one is needed; of those before it, the costliest are spared first.
    for change in reversed(made[len(needed) : -1]):
        without = [other for other in made if other is not change]
        made = without if fits(without) else made
    changed = _changed(run, *made)
    if total(changed) <= device_bytes:
        return made
    return [*made, _batch(changed, max(1, _largest_batch(changed, device_bytes, total)))]


def _card(least: int) -> str:
    for label, gib in CARDS.items():
        if least <= gib * GIB:
            return f"a card of {label} GB"
    return "no single card; shard it over several (FSDP)"
