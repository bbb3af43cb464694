"""A frozen linear layer with a LoRA update, as one differentiable operation without round trips through float32.

    y = x W^T + s (x A^T) B^T

Why: written as modules, the update of one 4096 x 4096 projection at 8192 tokens passes over [T, out] five times (the
layer's clone, the product with B, its scaling, its cast, the sum) and, outside autocast, casts the input to float32.
Here B's product is accumulated into the layer's output by the GEMM itself, the scale goes into the [out, r] matrix,
and backward does the same with the input's gradient.

How: the products run in x's dtype; A and B are float32 masters, cast once. W is either a plain weight or NF4 bytes,
which are dequantized for the product and again for its backward, never kept. Kept: x (shared by all projections that
read it), x A^T, and the casts of A and B.

Leaves out: dropout, DoRA, several adapters at a time (PEFT's own layer does those).

Shape suffixes: T tokens, I and O the layer's input and output, R the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels.nf4 import Nf4Weights
from finetune.kernels.packed_experts import dequantize_experts


def lora_linear(x: Tensor, weight: Tensor | Nf4Weights, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """[..., O] in x's dtype.

    Args:
        x: [..., I], float32, bfloat16 or float16.
        weight: [O, I], or that one matrix packed; frozen.
        a_RI: LoRA's A, any float dtype; gets its gradient in that dtype.
        b_OR: LoRA's B, likewise.
        scaling: factor of the update.
    """
    y_TO: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, a_RI, b_OR, scaling)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _matrix(weight: Tensor | Nf4Weights, dtype: torch.dtype) -> Tensor:
    return dequantize_experts(weight, dtype)[0] if isinstance(weight, Nf4Weights) else weight.to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: Tensor | Nf4Weights, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x_TI.device.type, enabled=False):
            a, scaled_b = a_RI.to(x_TI.dtype), (b_OR * scaling).to(x_TI.dtype)
            xa_TR = x_TI @ a.T
            y_TO = x_TI @ _matrix(weight, x_TI.dtype).T
            y_TO.addmm_(xa_TR, scaled_b.T)
        ctx.save_for_backward(x_TI, xa_TR, a, scaled_b)
        ctx.weight, ctx.scaling, ctx.master = weight, scaling, a_RI.dtype
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, xa_TR, a_RI, scaled_b_OR = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad_TO.device.type, enabled=False):
            grad_TO = grad_TO.to(x_TI.dtype)
            grad_xa_TR = grad_TO @ scaled_b_OR
            if ctx.needs_input_grad[3]:
                grad_b = _product(grad_TO.T, xa_TR, ctx.master).mul_(ctx.scaling)
            if ctx.needs_input_grad[2]:
                grad_a = _product(grad_xa_TR.T, x_TI, ctx.master)
            if ctx.needs_input_grad[0]:
                grad_x = grad_TO @ _matrix(ctx.weight, x_TI.dtype)
                grad_x.addmm_(grad_xa_TR, a_RI)
        return grad_x, None, grad_a, grad_b, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on CUDA the float32 sums are written as they are, not rounded to 16 bits first."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
