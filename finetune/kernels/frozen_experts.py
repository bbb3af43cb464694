"""The mixture of frozen 4-bit experts as one differentiable operation.

    y_t = sum_k s_tk * W_d[e] (act(W_g[e] x_t) * W_u[e] x_t),   e = index_tk

The experts get no gradient; the input and the routing weights do. The backward pass needs only products with the
dequantized weights (dX), and the routing weights' gradient comes out of the same product, without recomputing the
down projection: with a = act(g) * u and v = W_d^T dy,

    ds_tk = <W_d^T dy_t, a_tk>,    da_tk = s_tk W_d^T dy_t.

ds is always computed, also for a frozen router: the router's logits depend on the hidden states.

How: the (token, choice) pairs are sorted by expert (stable, so the row order is deterministic and there are no
atomics), each expert that got rows is dequantized into a temporary and multiplied, and the sums over a token's
choices run in float32. Kept for backward: the routing and the gate_up output (2 * top_k * F elements a token); the
input is not needed, and dequantized weights are never kept.

What it leaves out: fused kernels and a grouped GEMM. One expert's bf16 weights (0.35 GB for Mixtral 8x7B) is all the
workspace, at the price of one host synchronization a pass for the row counts.

Shapes: T tokens, K choices, S = T * K rows, E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels.nf4 import Nf4Stack, dequantize_expert


def frozen_experts(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up: Nf4Stack, down: Nf4Stack) -> Tensor:
    """Output [T, H] in x's dtype of the SwiGLU experts, differentiable in `x_TH` and `weight_TK`.

    Args:
        x_TH: float32, bfloat16 or float16; the matrix products run in this dtype.
        index_TK: int64, chosen experts.
        weight_TK: routing weights, any float dtype; used and differentiated in float32.
        gate_up: E matrices [2F, H], gate's rows first.
        down: E matrices [H, F].
    """
    return _FrozenExperts.apply(x_TH, index_TK, weight_TK, gate_up, down)


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up: Nf4Stack, down: Nf4Stack
    ) -> Tensor:
        with torch.autocast(x_TH.device.type, enabled=False):
            tokens, top_k = index_TK.shape
            order_S = index_TK.reshape(-1).argsort(stable=True)
            counts = index_TK.reshape(-1).bincount(minlength=gate_up.packed.shape[0]).tolist()
            token_S = order_S // top_k
            h_S2F = x_TH.new_empty(tokens * top_k, gate_up.matrix_shape[0])
            y_SH = x_TH.new_empty(tokens * top_k, x_TH.shape[1])
            for expert, rows in _expert_rows(counts):
                torch.mm(x_TH[token_S[rows]], dequantize_expert(gate_up, expert, x_TH.dtype).T, out=h_S2F[rows])
                torch.mm(_swiglu(h_S2F[rows]), dequantize_expert(down, expert, x_TH.dtype).T, out=y_SH[rows])
            ctx.save_for_backward(h_S2F, weight_TK, order_S)
            # Not saved as tensors: they are frozen and outlive the graph, and hooks on saved tensors (offloading,
            # checkpointing) must not copy gigabytes of weights.
            ctx.counts, ctx.gate_up, ctx.down = counts, gate_up, down
            y_TKH = _unsort(y_SH, order_S).view(tokens, top_k, x_TH.shape[1])
            scaled = y_TKH.float() * weight_TK.float().unsqueeze(-1)
            return scaled.sum(1).to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        h_S2F, weight_TK, order_S = ctx.saved_tensors
        tokens, top_k = weight_TK.shape
        with torch.autocast(grad_TH.device.type, enabled=False):
            token_S, weight_S = order_S // top_k, weight_TK.reshape(-1)[order_S].float()
            grad_weight_S = torch.empty_like(weight_S)
            grad_x_SH = grad_TH.new_empty(order_S.numel(), grad_TH.shape[1], dtype=h_S2F.dtype)
            for expert, rows in _expert_rows(ctx.counts):
                v = grad_TH[token_S[rows]].to(h_S2F.dtype) @ dequantize_expert(ctx.down, expert, h_S2F.dtype)
                grad_h, grad_weight_S[rows] = _swiglu_backward(h_S2F[rows], v, weight_S[rows])
                torch.mm(grad_h, dequantize_expert(ctx.gate_up, expert, h_S2F.dtype), out=grad_x_SH[rows])
            grad_x_TKH = _unsort(grad_x_SH, order_S).view(tokens, top_k, grad_TH.shape[1])
            grad_x = grad_x_TKH.float().sum(1).to(grad_TH.dtype)
            grad_weight = _unsort(grad_weight_S, order_S).view(tokens, top_k).to(weight_TK.dtype)
        return grad_x, None, grad_weight, None, None


def _expert_rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its slice of the sorted rows) for every expert that got rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _unsort(rows_S: Tensor, order_S: Tensor) -> Tensor:
    """Rows back in (token, choice) order; every row is written once, so no atomics."""
    out = torch.empty_like(rows_S)
    out[order_S] = rows_S
    return out


def _swiglu(h_S2F: Tensor) -> Tensor:
    gate, up = h_S2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(h_S2F: Tensor, v_SF: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the gate_up output [S, 2F] and of the routing weight [S] (float32), from v = W_d^T dy."""
    gate, up = h_S2F.float().chunk(2, dim=-1)
    v = v_SF.float()
    sigmoid = gate.sigmoid()
    act = gate * sigmoid
    grad_weight = (v * act * up).sum(-1)
    v = v * weight_S.unsqueeze(-1)
    grad_gate = v * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, v * act], dim=-1).to(h_S2F.dtype), grad_weight
