"""What surrounds the experts' products: tokens sorted by expert, gathered, SwiGLU between the products, and the sum.

A token's K choices become K rows. Sorting is stable, so the order of rows is a function of the routing alone; a row is
written once and a token's sum runs over its choices in float32: no atomics, the same bits every time.

SwiGLU is a = silu(g) * u, with [g, u] = h the gate_up output. Its backward pass yields the routing weight's gradient
too. It starts from v = W_d^T dy, where dy is the output's gradient before the routing weight s of the row is applied
(y = sum_k s_k W_d a_k):

    ds = <v, a>,   da = s v,   dg = da * u * silu'(g),   du = da * silu(g),   silu'(g) = sig(g) (1 + g (1 - sig(g))).

All arithmetic is float32 whatever the storage; ds is returned in float32. The gradient of h takes h's place, which
saves 2F elements a row: 0.94 GB at 8192 tokens of Mixtral 8x7B.

Shape suffixes: T tokens, K choices, S = T * K rows sorted by expert, E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, operator

if HAS_TRITON:
    from finetune.kernels import triton_kernels


class ExpertRows(NamedTuple):
    """Which row belongs to whom, int32 on the device.

    token_S: the token of each row.
    order_S: the choice (token * K + its rank) of each row.
    position_TK: the row of each choice, the inverse of `order_S`.
    end_E: where each expert's rows end.
    """

    token_S: Tensor
    order_S: Tensor
    position_TK: Tensor
    end_E: Tensor


def sort_by_expert(index_TK: Tensor, experts: int) -> ExpertRows:
    """Sorts the choices [T, K] (int64, from 0 to below `experts`) by expert, stably; no host synchronization.

    Routers give no other numbers, not even of NaN: torch's top-k does not, and `kernels.decode.route` sees to it.
    """
    return ExpertRows(*_sort_by_expert(index_TK, experts))


def _empty_rows(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.empty(index_TK.numel(), dtype=torch.int32, device=index_TK.device)
    return rows, torch.empty_like(rows), rows.new_empty(index_TK.shape), rows.new_empty(experts)


@operator(launch=HAS_TRITON and triton_kernels.sort_rows, empty=_empty_rows)
def _sort_by_expert(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sorted_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    numbers = torch.arange(experts, device=index_TK.device)
    end_E = torch.searchsorted(sorted_S, numbers, right=True, out_int32=True)
    position = torch.empty_like(order_S)
    position[order_S] = torch.arange(order_S.numel(), device=index_TK.device)
    token_S = order_S // index_TK.shape[1]
    return token_S.int(), order_S.int(), position.view(index_TK.shape).int(), end_E


@operator(
    launch=HAS_TRITON and triton_kernels.gather_rows,
    empty=lambda x_TH, token_S: x_TH.new_empty(token_S.shape[0], x_TH.shape[1]),
)
def gather_rows(x_TH: Tensor, token_S: Tensor) -> Tensor:
    """[S, H]: row s is x[token[s]]. Contiguous, also where `x_TH` is not (a gradient without strides)."""
    return x_TH[token_S]


@operator(
    launch=HAS_TRITON and triton_kernels.combine_rows,
    empty=lambda y_SH, position_TK, weight_TK: y_SH.new_empty(position_TK.shape[0], y_SH.shape[1]),
)
def combine_rows(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """[T, H] in y's dtype: the sum of a token's rows in float32, each times its routing weight where one is given."""
    y_TKH = y_SH[position_TK].float()
    return (y_TKH if weight_TK is None else y_TKH * weight_TK.float().unsqueeze(-1)).sum(1).to(y_SH.dtype)


@operator(
    launch=HAS_TRITON and triton_kernels.swiglu_forward,
    empty=lambda h_S2F: h_S2F.new_empty(h_S2F.shape[0], h_S2F.shape[1] // 2),
)
def swiglu_forward(h_S2F: Tensor) -> Tensor:
    """[S, F] in h's dtype."""
    gate, up = h_S2F.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(h_S2F.dtype)


def swiglu_backward_(h_S2F: Tensor, v_SF: Tensor, weight_TK: Tensor, order_S: Tensor) -> Tensor:
    """Replaces `h_S2F` by its gradient; returns the routing weights' gradient [T, K], float32.

    Args:
        weight_TK: routing weights of the choices.
        order_S: the choice of each row (`ExpertRows.order_S`).
    """
    # So that a second backward pass over the same graph is refused instead of reading a gradient as h.
    torch.autograd.graph.increment_version(h_S2F)
    return _swiglu_backward_(h_S2F, v_SF, weight_TK, order_S)


def _empty_weight_gradient(h_S2F: Tensor, v_SF: Tensor, weight_TK: Tensor, order_S: Tensor) -> Tensor:
    return torch.empty(weight_TK.shape, dtype=torch.float32, device=h_S2F.device)


@operator(launch=HAS_TRITON and triton_kernels.swiglu_backward, empty=_empty_weight_gradient, writes=["h_S2F"])
def _swiglu_backward_(h_S2F: Tensor, v_SF: Tensor, weight_TK: Tensor, order_S: Tensor) -> Tensor:
    gate, up = h_S2F.float().chunk(2, dim=-1)
    v = v_SF.float()
    sigmoid = gate.sigmoid()
    act = gate * sigmoid
    grad_weight = _empty_weight_gradient(h_S2F, v_SF, weight_TK, order_S)
    grad_weight.view(-1)[order_S] = (v * act * up).sum(-1)
    v = v * weight_TK.reshape(-1)[order_S].float().unsqueeze(-1)
    h_S2F.copy_(torch.cat([v * up * sigmoid * (1 + gate * (1 - sigmoid)), v * act], dim=-1))
    return grad_weight
