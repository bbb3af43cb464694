"""The raw Triton kernels: one for each memory-bound pass around the experts' matrix products.

Imported only where triton is installed, and called only through the operators beside it (`rows.py`, `swiglu.py`), each
of which has the same operation in plain torch as its truth. Every output element is written by exactly one program in a
fixed order of summation: no atomics, so the same bits every time. Offsets that can pass 2^31 elements (S rows of 2F:
from 37,450 tokens of Mixtral 8x7B) are computed in 64 bits.

Leaves out: the matrix products, which are cuBLAS's or CUTLASS's.

Shape suffixes: T tokens, K choices, S = T * K rows sorted by expert, H hidden, F intermediate.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import launch


@triton.jit
def sort_rows_kernel(
    index_ptr,
    token_ptr,
    order_ptr,
    position_ptr,
    end_ptr,
    S,
    TOP_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one expert's rows, a stable counting sort of the choices by expert.

    One launch for what a sort, a search and an inverse permutation do in about fifteen; 2,048 tokens are bound by them.
    """
    expert = tl.program_id(0)
    before = tl.zeros([CHUNK], dtype=tl.int32)
    for chunk in range(CHUNKS):
        choice = chunk * CHUNK + tl.arange(0, CHUNK)
        key = tl.load(index_ptr + choice, mask=choice < S, other=2**31 - 1)
        before += (key < expert).to(tl.int32)
    start = tl.sum(before)
    for chunk in range(CHUNKS):
        choice = chunk * CHUNK + tl.arange(0, CHUNK)
        key = tl.load(index_ptr + choice, mask=choice < S, other=2**31 - 1)
        mine = (key == expert).to(tl.int32)
        row = start + tl.cumsum(mine, 0) - mine
        tl.store(token_ptr + row, choice // TOP_K, mask=mine == 1)
        tl.store(order_ptr + row, choice, mask=mine == 1)
        tl.store(position_ptr + choice, row, mask=mine == 1)
        start += tl.sum(mine)
    tl.store(end_ptr + expert, start)


@triton.jit
def gather_rows_kernel(x_ptr, token_ptr, out_ptr, H, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one output row, out[s] = x[token[s]]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    token = tl.load(token_ptr + row)
    tl.store(out_ptr + row * H + column, tl.load(x_ptr + token * H + column, mask=inside), mask=inside)


@triton.jit
def combine_rows_kernel(
    y_ptr, position_ptr, weight_ptr, out_ptr, H, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK columns of one token, summed over its choices in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + choice)
        y = tl.load(y_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + token * TOP_K + choice).to(tl.float32)
        total += y
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward_kernel(h_ptr, out_ptr, F, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row, out = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(h_ptr + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(h_ptr, v_ptr, weight_ptr, order_ptr, grad_weight_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row. Replaces h by its gradient and writes the routing weight's gradient.

    v = W_d^T dy, without the routing weight s: ds = <v, a>, da = s v. s and ds lie in the order of the choices.
    """
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order_ptr + row)
    weight = tl.load(weight_ptr + choice).to(tl.float32)
    gate_ptr, up_ptr = h_ptr + row * 2 * F, h_ptr + row * 2 * F + F
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        total += v * act * up
        v *= weight
        grad_gate = v * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(gate_ptr + column, grad_gate.to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(up_ptr + column, (v * act).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weight_ptr + choice, tl.sum(total))


# ---- launches: shapes and dtypes are the operators' business -----------------------------------------------------

# The best of those tried on an H100 (torch 2.11, triton 3.6) at the shapes of Mixtral 8x7B: SwiGLU reaches 96% of the
# copy rate. `python -m bench kernels` measures the ones chosen.
COLUMN_BLOCK = 1024
SORT_CHUNK, SORT_WARPS = 2048, 8
SWIGLU_BACKWARD_BLOCK, SWIGLU_BACKWARD_WARPS = 2048, 8


def sort_rows(index_TK: Tensor, token_S: Tensor, order_S: Tensor, position_TK: Tensor, end_E: Tensor) -> None:
    """Writes the four int32 outputs."""
    choices = index_TK.numel()
    # A power of two, so that token counts share compiled kernels.
    chunks = triton.next_power_of_2(triton.cdiv(choices, SORT_CHUNK))
    launch(
        sort_rows_kernel, (end_E.numel(),), index_TK, token_S, order_S, position_TK, end_E, choices,
        TOP_K=index_TK.shape[1], CHUNKS=chunks, CHUNK=SORT_CHUNK, num_warps=SORT_WARPS,
    )  # fmt: skip


def gather_rows(x_TH: Tensor, token_S: Tensor, out_SH: Tensor) -> None:
    rows, hidden = out_SH.shape
    block = min(triton.next_power_of_2(hidden), COLUMN_BLOCK)
    launch(gather_rows_kernel, (rows, triton.cdiv(hidden, block)), x_TH, token_S, out_SH, hidden, BLOCK=block)


def combine_rows(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None, out_TH: Tensor) -> None:
    (tokens, top_k), hidden = position_TK.shape, y_SH.shape[1]
    block = min(triton.next_power_of_2(hidden), COLUMN_BLOCK)
    launch(
        combine_rows_kernel, (tokens, triton.cdiv(hidden, block)), y_SH, position_TK,
        position_TK if weight_TK is None else weight_TK, out_TH, hidden,
        TOP_K=top_k, WEIGHTED=weight_TK is not None, BLOCK=block,
    )  # fmt: skip


def swiglu_forward(h_S2F: Tensor, out_SF: Tensor) -> None:
    rows, width = out_SF.shape
    block = min(triton.next_power_of_2(width), COLUMN_BLOCK)
    launch(swiglu_forward_kernel, (rows, triton.cdiv(width, block)), h_S2F, out_SF, width, BLOCK=block)


def swiglu_backward(h_S2F: Tensor, v_SF: Tensor, weight_TK: Tensor, order_S: Tensor, grad_weight_TK: Tensor) -> None:
    rows, width = v_SF.shape
    block = min(triton.next_power_of_2(width), SWIGLU_BACKWARD_BLOCK)
    launch(
        swiglu_backward_kernel, (rows,), h_S2F, v_SF, weight_TK, order_S, grad_weight_TK,
        F=width, BLOCK=block, num_warps=SWIGLU_BACKWARD_WARPS,
    )  # fmt: skip
