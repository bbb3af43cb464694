"""Rows of the experts: tokens sorted by expert, gathered before the products and combined after them.

A token's K choices become K rows. Sorting is stable, so the order of rows is a function of the routing alone; a row is
written once and a token's sum runs over its choices in float32: no atomics, the same bits every time.

Shape suffixes: T tokens, K choices, S = T * K rows sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, define

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


# ---- sort --------------------------------------------------------------------------------------------------------


def _sort_plain(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sorted_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    numbers = torch.arange(experts, device=index_TK.device)
    end_E = torch.searchsorted(sorted_S, numbers, right=True, out_int32=True)
    position = torch.empty_like(order_S)
    position[order_S] = torch.arange(order_S.numel(), device=index_TK.device)
    token_S = order_S // index_TK.shape[1]
    return token_S.int(), order_S.int(), position.view(index_TK.shape).int(), end_E


def _empty_rows(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.empty(index_TK.numel(), dtype=torch.int32, device=index_TK.device)
    position = torch.empty(index_TK.shape, dtype=torch.int32, device=index_TK.device)
    return rows, torch.empty_like(rows), position, rows.new_empty(experts)


def _sort_cuda(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_rows(index_TK, experts)
    triton_kernels.sort_rows(index_TK.contiguous(), *outputs)
    return outputs


_sort = define(
    "sort_by_expert(Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    plain=_sort_plain,
    cuda=_sort_cuda if HAS_TRITON else None,
    fake=_empty_rows,
)


def sort_by_expert(index_TK: Tensor, experts: int) -> ExpertRows:
    """Sorts the choices [T, K] (int64, from 0 to below `experts`) by expert, stably; no host synchronization.

    Routers give no other numbers, of NaN neither: torch's top-k does not, and `kernels.decode.route` sees to it.
    """
    return ExpertRows(*_sort(index_TK, experts))


# ---- gather ------------------------------------------------------------------------------------------------------


def _gather_plain(x_TH: Tensor, token_S: Tensor) -> Tensor:
    return x_TH[token_S]


def _gather_cuda(x_TH: Tensor, token_S: Tensor) -> Tensor:
    out = x_TH.new_empty(token_S.numel(), x_TH.shape[1])
    triton_kernels.gather_rows(x_TH.contiguous(), token_S, out)
    return out


_gather = define(
    "gather_rows(Tensor x, Tensor token) -> Tensor",
    plain=_gather_plain,
    cuda=_gather_cuda if HAS_TRITON else None,
    fake=lambda x, token: x.new_empty(token.shape[0], x.shape[1]),
)


def gather_rows(x_TH: Tensor, token_S: Tensor) -> Tensor:
    """[S, H]: row s is x[token[s]]. Contiguous, also where `x_TH` is not (a gradient without strides)."""
    return _gather(x_TH, token_S)


# ---- combine -----------------------------------------------------------------------------------------------------


def _combine_plain(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    y_TKH = y_SH[position_TK].float()
    return (y_TKH if weight_TK is None else y_TKH * weight_TK.float().unsqueeze(-1)).sum(1).to(y_SH.dtype)


def _combine_cuda(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    out = y_SH.new_empty(position_TK.shape[0], y_SH.shape[1])
    triton_kernels.combine_rows(y_SH, position_TK, None if weight_TK is None else weight_TK.contiguous(), out)
    return out


_combine = define(
    "combine_rows(Tensor y, Tensor position, Tensor? weight) -> Tensor",
    plain=_combine_plain,
    cuda=_combine_cuda if HAS_TRITON else None,
    fake=lambda y, position, weight: y.new_empty(position.shape[0], y.shape[1]),
)


def combine_rows(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """[T, H] in y's dtype: the sum of a token's rows in float32, each times its routing weight where one is given."""
    return _combine(y_SH, position_TK, weight_TK)
