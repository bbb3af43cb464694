"""A stack of experts' matrices in whatever format it is stored: NF4 (`nf4.py`), or 2 or 3 bits (`low_bit.py`).

Both are NamedTuples of tensors whose first dimension is the expert, the first of them `packed`: what treats a stack as
bytes (saving, moving, caching single experts) needs to know no more. What multiplies with it asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from finetune.kernels.low_bit import Bits, LowBitStack, empty_low_bit, quantize_low_bit
from finetune.kernels.nf4 import Nf4Stack, empty_stack, quantize_stack

ExpertStack = Nf4Stack | LowBitStack
ExpertStorage = Literal["nf4", "hqq3", "hqq2"]
BITS: dict[ExpertStorage, Bits] = {"hqq3": 3, "hqq2": 2}


def stack_type(storage: ExpertStorage) -> type[Nf4Stack] | type[LowBitStack]:
    return Nf4Stack if storage == "nf4" else LowBitStack


def empty_experts(storage: ExpertStorage, experts: int, out: int, in_: int, device: torch.device | str) -> ExpertStack:
    """An uninitialised stack with the right shapes and dtypes (the meta device serves for placeholders)."""
    if storage == "nf4":
        return empty_stack(experts, out, in_, device)
    return empty_low_bit(BITS[storage], experts, out, in_, device)


def quantize_experts(storage: ExpertStorage, weight_EOI: Tensor) -> ExpertStack:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) expert by expert; the result lives on the same device."""
    return quantize_stack(weight_EOI) if storage == "nf4" else quantize_low_bit(weight_EOI, BITS[storage])


def stack_of(tensors: Sequence[Tensor]) -> ExpertStack:
    """The stack whose tensors these are; an operator takes them as a list."""
    if len(tensors) == len(Nf4Stack._fields):
        return Nf4Stack(*tensors)
    return LowBitStack(*tensors)


def dequantize_stack(stack: ExpertStack, dtype: torch.dtype) -> Tensor:
    """[E, out, in] of all matrices in `dtype` (float32, bfloat16 or float16)."""
    out = torch.empty(stack.packed.shape[0], *stack.matrix_shape, dtype=dtype, device=stack.packed.device)
    stack.dequantize_into(out)
    return out


def dequantize_expert(stack: ExpertStack, expert: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """[out, in] of one expert in `dtype` (float32, bfloat16 or float16), written to `out` where it is given."""
    if out is None:
        out = torch.empty(stack.matrix_shape, dtype=dtype, device=stack.packed.device)
    type(stack)(*(tensor[expert : expert + 1] for tensor in stack)).dequantize_into(out.unsqueeze(0))
    return out
