"""What adapters change in a weight, one weight at a time: LoRA, DoRA, trained routers and non-MoE tunings, several of
them added up with factors.

An adapter's update of W is s B A for LoRA and rsLoRA (s is alpha/r or alpha/sqrt(r)). For the rest it is the difference
from W of what replaces it: m (W + s B A) / ||W + s B A|| for DoRA (arXiv 2402.09353, eq. 5; norms over each output's
row), the trained weight itself for routers and non-MoE tunings. Adapters combine as W + sum of factor * update, in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapter import Adapter
from finetune.errors import AdapterError
from finetune.export.base import Tensors

_LORA_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weighted:
    """An adapter folder and the factor of its update."""

    folder: Path
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Weighted:
        """From `PATH=FACTOR`; without a factor it is 1.

        Raises:
            AdapterError: the factor is not a finite number.
        """
        path, equals, factor = text.rpartition("=")
        try:
            value = float(factor) if equals else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise AdapterError(
                f"{factor!r} is not a factor",
                where=f"--with {text}",
                allowed="PATH=NUMBER, or PATH alone for 1",
                fix="give a number like 0.5 after the last '='",
            )
        return cls(Path(path if equals else text), value)


class Tuning:
    """One adapter folder, read tensor by tensor."""

    def __init__(self, adapter: Adapter, factor: float):
        self.adapter, self.factor = adapter, factor
        self._lora, self._scaling = adapter.kind == "lora", adapter.scaling
        self._tensors = Tensors([adapter.tensors_file], kind=AdapterError)

    def changes(self, name: str) -> bool:
        """Whether a parameter, by transformers' name, is another with this adapter."""
        return self._name(name) in self._tensors or f"{self._matrix(name)}.lora_A.weight" in self._tensors

    def added(self, name: str, base: Tensor, weight: Tensor) -> Tensor:
        """`weight` plus the factor times this adapter's update of `base`; all float32 [out, in] or [out]."""
        path = self._matrix(name)
        if f"{path}.lora_A.weight" not in self._tensors:
            return self._moved(base, weight, self._tensors.read(self._name(name)).float())
        a, b = (self._tensors.read(f"{path}.{part}.weight").float() for part in ("lora_A", "lora_B"))
        if f"{path}.lora_magnitude_vector" not in self._tensors:
            return weight + self.factor * self._scaling * (b @ a)
        magnitude = self._tensors.read(f"{path}.lora_magnitude_vector").float().view(-1, 1)
        tuned = base + self._scaling * (b @ a)
        return self._moved(base, weight, magnitude * tuned / tuned.norm(dim=1, keepdim=True))

    def _moved(self, base: Tensor, weight: Tensor, tuned: Tensor) -> Tensor:
        if self.factor == 1 and weight is base:
            return tuned  # base + (tuned - base) would round
        return weight + self.factor * (tuned - base)

    def _name(self, name: str) -> str:
        return f"{_LORA_PREFIX}{name}" if self._lora else name

    def _matrix(self, name: str) -> str:
        return self._name(name).removesuffix(".weight")


def tuned_weight(tunings: Sequence[Tuning], name: str, base: Tensor) -> Tensor:
    """float32: the base's weight with every update added, in order.

    Raises:
        AdapterError: the result is not finite.
    """
    start = base.float()
    weight = start
    for tuning in tunings:
        if tuning.changes(name):
            weight = tuning.added(name, start, weight)
    if not torch.isfinite(weight).all():
        raise AdapterError(
            "a merged weight is not finite",
            where=name,
            fix="train again with a lower learning rate, or combine the adapters with smaller factors",
        )
    return weight
