"""How much of an adapter's update is left when the merged weight is rounded to a format.

W is a weight as it was in training and U the adapter's update of it. Merged and rounded the weight is round(W + U), and
what the rounding left of the update is its share in the direction of U, <round(W + U) - round(W), U> / <U, U>: 1 where
nothing is lost, 0 where the format does not see the update. Beside it stands the rounding's error in units of the
update, ||round(W + U) - (W + U)|| / ||U||: noise that the update has to be heard through. bfloat16 rounds by at most
2^-9 of a weight, float16 by 2^-12; between the levels of NF4 lie 10% of a block's largest weight and more, and a W that
lies on a level stays there until U carries it half way to the next.

Formats: `nf4` quantizes the merged attention again, as PEFT's `merge_and_unload` of a 4-bit layer does (arithmetic in
float32); `bf16` and `fp16` are those of `finetune merge`, and its `nf4` format keeps attention in bf16. An update can
be scaled to a share of its weight's norm first, to see what a weaker or stronger tuning would keep.

Leaves out: experts, which no adapter changes. Only attention is ever rounded to NF4; routers, norms, embeddings and
head of a tuning count in the 16-bit formats alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import MergeSource, tuned_weight
from finetune.kernels import dequantize_expert, quantize_nf4
from finetune.moe import role_of

# Below this share of the update a merge is another model than the one that was trained.
KEPT_AT_LEAST = 0.9


def _nf4(weight: Tensor) -> Tensor:
    return dequantize_expert(quantize_nf4(weight.unsqueeze(0)), 0, torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": _nf4,
    "bf16": lambda weight: weight.to(torch.bfloat16).float(),
    "fp16": lambda weight: weight.to(torch.float16).float(),
}


@dataclass(frozen=True)
class Kept:
    """kept: share of the update that a rounding leaves; error: the rounding's error over the update's norm."""

    kept: float
    error: float


@dataclass(frozen=True)
class Projection:
    """One weight: the update's norm over the weight's, and what each format leaves of it."""

    name: str
    relative: float
    formats: dict[str, Kept]


@dataclass(frozen=True)
class Survival:
    """All weights together, weighted by the square of their updates.

    scale: what every update was scaled to, of its weight's norm; None as trained.
    lowest: the smallest share of a single projection.
    """

    scale: float | None
    relative: float
    formats: dict[str, Kept]
    lowest: dict[str, float]
    projections: tuple[Projection, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    along: float = 0.0
    error: float = 0.0
    update: float = 0.0

    def add(self, other: _Sums) -> None:
        self.along, self.error = self.along + other.along, self.error + other.error
        self.update += other.update

    def kept(self) -> Kept:
        return Kept(self.along / self.update, math.sqrt(self.error / self.update))


def survival(source: MergeSource, scales: Sequence[float | None] = (None,)) -> list[Survival]:
    """What every format keeps, for each scale; empty where the adapter changes nothing.

    Args:
        scales: norm of the update over the weight's; None leaves it as it was trained.

    Raises:
        AdapterError: a tuned weight is not finite.
    """
    totals: list[dict[str, _Sums]] = [{name: _Sums() for name in ROUNDINGS} for _ in scales]
    found: list[list[Projection]] = [[] for _ in scales]
    squares = [[0.0, 0.0] for _ in scales]
    for name in source.shapes:
        if not any(tuning.changes(name) for tuning in source.tunings):
            continue
        weight = source.weights.weight(name).float()
        update = tuned_weight(source.tunings, name, weight) - weight
        norms = [math.sqrt(_dot(tensor, tensor)) for tensor in (update, weight)]
        if not all(norms):  # an untrained part of an adapter
            continue
        formats = list(ROUNDINGS) if role_of(name) == "attention" else ["bf16", "fp16"]
        rounded = {format: ROUNDINGS[format](weight) for format in formats}
        for number, scale in enumerate(scales):
            factor = 1.0 if scale is None else scale * norms[1] / norms[0]
            sums = {format: _rounded_sums(weight, factor * update, format, rounded[format]) for format in formats}
            for format in formats:
                totals[number][format].add(sums[format])
            of_formats = {format: made.kept() for format, made in sums.items()}
            found[number].append(Projection(name, factor * norms[0] / norms[1], of_formats))
            squares[number][0] += (factor * norms[0]) ** 2
            squares[number][1] += norms[1] ** 2
    return [
        _together(scale, math.sqrt(square[0] / square[1]), sums, projections)
        for scale, square, sums, projections in zip(scales, squares, totals, found, strict=True)
        if projections
    ]


def lost_in(made: Survival) -> list[str]:
    """A warning for every format that keeps less than `KEPT_AT_LEAST` of the update."""
    return [
        f"{format} keeps {kept.kept:.0%} of the update ({made.relative:.2%} of the weights' norm; the rounding's error "
        f"is {kept.error:.1f} times the update): {_WAY_OUT[format]}"
        for format, kept in made.formats.items()
        if kept.kept < KEPT_AT_LEAST
    ]


_WAY_OUT = {
    "nf4": "do not quantize the merged attention; `finetune merge --format nf4` keeps it in bf16",
    "bf16": "serve the adapter itself, or merge with --format fp16",
    "fp16": "serve the adapter itself",
}


def _rounded_sums(weight: Tensor, update: Tensor, format: str, rounded: Tensor) -> _Sums:
    merged = weight + update
    after = ROUNDINGS[format](merged)
    error = after - merged
    return _Sums(_dot(after - rounded, update), _dot(error, error), _dot(update, update))


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def _together(
    scale: float | None, relative: float, totals: dict[str, _Sums], projections: Sequence[Projection]
) -> Survival:
    used = [format for format, sums in totals.items() if sums.update]
    lowest = {format: min(one.formats[format].kept for one in projections if format in one.formats) for format in used}
    return Survival(scale, relative, {format: totals[format].kept() for format in used}, lowest, tuple(projections))
