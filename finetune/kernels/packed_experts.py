"""Packed expert weights, whatever their format: NF4 (`nf4.py`), or 2 or 3 bits (`low_bit.py`).

Both are NamedTuples of tensors whose first dimension is the expert, the first of them `packed`: what treats them as
bytes (saving, moving, caching single experts) needs to know no more. What multiplies with it asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from finetune.kernels.low_bit import Bits, LowBitWeights, empty_low_bit, quantize_low_bit
from finetune.kernels.nf4 import Nf4Weights, empty_nf4, quantize_nf4

PackedExperts = Nf4Weights | LowBitWeights
ExpertStorage = Literal["nf4", "hqq3", "hqq2"]
BITS: dict[ExpertStorage, Bits] = {"hqq3": 3, "hqq2": 2}


def packed_type(storage: ExpertStorage) -> type[Nf4Weights] | type[LowBitWeights]:
    return Nf4Weights if storage == "nf4" else LowBitWeights


def empty_experts(
    storage: ExpertStorage, experts: int, out: int, in_: int, device: torch.device | str
) -> PackedExperts:
    """Uninitialised weights with the right shapes and dtypes (the meta device serves for placeholders)."""
    if storage == "nf4":
        return empty_nf4(experts, out, in_, device)
    return empty_low_bit(BITS[storage], experts, out, in_, device)


def quantize_experts(storage: ExpertStorage, weight_EOI: Tensor) -> PackedExperts:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) expert by expert; the result lives on the same device."""
    return quantize_nf4(weight_EOI) if storage == "nf4" else quantize_low_bit(weight_EOI, BITS[storage])


def packed_from(tensors: Sequence[Tensor]) -> PackedExperts:
    """The weights whose tensors these are; an operator takes them as a list."""
    if len(tensors) == len(Nf4Weights._fields):
        return Nf4Weights(*tensors)
    return LowBitWeights(*tensors)


def dequantize_experts(weights: PackedExperts, dtype: torch.dtype) -> Tensor:
    """[E, out, in] of all matrices in `dtype` (float32, bfloat16 or float16)."""
    out = torch.empty(weights.packed.shape[0], *weights.matrix_shape, dtype=dtype, device=weights.packed.device)
    weights.dequantize_into(out)
    return out


def dequantize_expert(weights: PackedExperts, expert: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """[out, in] of one expert in `dtype` (float32, bfloat16 or float16), written to `out` where it is given."""
    if out is None:
        out = torch.empty(weights.matrix_shape, dtype=dtype, device=weights.packed.device)
    type(weights)(*(tensor[expert : expert + 1] for tensor in weights)).dequantize_into(out.unsqueeze(0))
    return out
