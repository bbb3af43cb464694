"""The mixture of frozen quantized experts as one differentiable operation.

    y_t = sum_k s_tk * W_d[e] (silu(W_g[e] x_t) * W_u[e] x_t),   e = index_tk

The experts get no gradient; the input and the routing weights do. The backward pass needs only products with the
dequantized weights (dX), and the routing weights' gradient comes out of the same product, without recomputing the
down projection: with a = silu(g) * u and v = W_d^T dy,

    ds_tk = <W_d^T dy_t, a_tk>,    da_tk = s_tk W_d^T dy_t.

ds is always computed, also for a frozen router: the router's logits depend on the hidden states.

How: the (token, choice) pairs are sorted by expert, multiplied by one of the backends of `experts_matmul.py`, and a
token's choices are summed in float32. Kept for backward: the routing, always, and either the gate_up output h
(2 * top_k * F elements a token) or the input x, from which h is computed again. Dequantized weights are never kept.

What a surrounding checkpoint may recompute: only x. The routing and h are taken out of its reach by the caller
(`saved_tensors_hooks` around the call, see `moe/experts.py`); x comes from the node of `remember`, which the
checkpoint's recomputation reaches last, so that it stops before the experts.

Shapes: T tokens, K choices, S = T * K rows, E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels.experts_matmul import Backend, experts_matmul
from finetune.kernels.packed_experts import PackedExperts
from finetune.kernels.rows import combine_rows, gather_rows, sort_by_expert
from finetune.kernels.swiglu import swiglu_backward_, swiglu_forward


def frozen_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    *,
    backend: Backend = "loop",
    keep_gate_up: bool = True,
    source: Any = None,
) -> Tensor:
    """Output [T, H] in x's dtype of the SwiGLU experts, differentiable in `x_TH` and `weight_TK`.

    Args:
        x_TH: float32, bfloat16 or float16; the matrix products run in this dtype.
        index_TK: int64, chosen experts.
        weight_TK: routing weights, any float dtype; used and differentiated in float32.
        gate_up: E matrices [2F, H], gate's rows first.
        down: E matrices [H, F].
        backend: see `experts_matmul.choose_backend`.
        keep_gate_up: False computes the gate_up output again in the backward pass, with the same bits.
        source: the node of `remember(x)`, asked for x where `keep_gate_up` is False; without it x itself is kept.
    """
    return _FrozenExperts.apply(x_TH, index_TK, weight_TK, gate_up, down, backend, keep_gate_up, source)


def remember(x_TH: Tensor) -> tuple[Tensor, Any]:
    """x, and the autograd node that keeps it: a surrounding checkpoint drops and recomputes what the node keeps.

    The node is None where nothing needs a gradient.
    """
    remembered = _Remember.apply(x_TH)
    return remembered, remembered.grad_fn


class _Remember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        gate_up: PackedExperts,
        down: PackedExperts,
        backend: Backend,
        keep_gate_up: bool,
        source: Any,
    ) -> Tensor:
        with torch.autocast(x_TH.device.type, enabled=False):
            rows = sort_by_expert(index_TK, gate_up.packed.shape[0])
            products = experts_matmul(backend, rows.end_E)
            h_S2F = products.forward(gather_rows(x_TH, rows.token_S), gate_up)
            y_SH = products.forward(swiglu_forward(h_S2F), down)
            kept = h_S2F if keep_gate_up else x_TH if source is None else None
            ctx.save_for_backward(kept, weight_TK, *rows[:3])
            # Not saved as tensors: they are frozen and outlive the graph, and hooks on saved tensors (offloading,
            # checkpointing) must not copy gigabytes of weights.
            ctx.products, ctx.gate_up, ctx.down = products, gate_up, down
            ctx.keep_gate_up, ctx.source, ctx.dtype = keep_gate_up, source, x_TH.dtype
            return combine_rows(y_SH, rows.position_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight_TK, token_S, order_S, position_TK = ctx.saved_tensors
        with torch.autocast(grad_TH.device.type, enabled=False):
            if ctx.keep_gate_up:
                h_S2F = kept
            else:
                x_TH = kept if ctx.source is None else ctx.source.saved_tensors[0]
                h_S2F = ctx.products.forward(gather_rows(x_TH, token_S), ctx.gate_up)
                del x_TH
            del kept
            v_SF = ctx.products.backward(gather_rows(grad_TH.to(ctx.dtype), token_S), ctx.down)
            grad_weight_TK = swiglu_backward_(h_S2F, v_SF, weight_TK, order_S)
            del v_SF
            grad_x = combine_rows(ctx.products.backward(h_S2F, ctx.gate_up), position_TK, None)
        return grad_x.to(grad_TH.dtype), None, grad_weight_TK.to(weight_TK.dtype), None, None, None, None, None
