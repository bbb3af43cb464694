"""The raw Triton kernels: one for each memory-bound pass around the experts' matrix products, and the expert cache's.

Imported only where triton is installed, and called only through the operators of `rows.py` and `expert_cache.py`, each
of which has the same operation in plain torch as its truth. Every output element is written by exactly one program in a
fixed order of summation: no atomics, so the same bits every time. Offsets that can pass 2^31 elements (S rows of 2F:
from 37,450 tokens of Mixtral 8x7B) are computed in 64 bits.

Leaves out: the matrix products, which are cuBLAS's or CUTLASS's.

Shape suffixes: T tokens, K choices, S = T * K rows sorted by expert, H hidden, F intermediate.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import launch


@triton.jit
def sort_rows_kernel(
    index_ptr, token_ptr, order_ptr, position_ptr, end_ptr, S,
    TOP_K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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


def sort_rows(
    index_TK: Tensor, experts: int, token_S: Tensor, order_S: Tensor, position_TK: Tensor, end_E: Tensor
) -> None:
    """Writes the four int32 outputs."""
    choices = index_TK.numel()
    # A power of two, so that token counts share compiled kernels.
    chunks = triton.next_power_of_2(triton.cdiv(choices, SORT_CHUNK))
    launch(
        sort_rows_kernel, (experts,), index_TK.contiguous(), token_S, order_S, position_TK, end_E, choices,
        TOP_K=index_TK.shape[1], CHUNKS=chunks, CHUNK=SORT_CHUNK, num_warps=SORT_WARPS,
    )  # fmt: skip


def gather_rows(x_TH: Tensor, token_S: Tensor, out_SH: Tensor) -> None:
    rows, hidden = out_SH.shape
    block = min(triton.next_power_of_2(hidden), COLUMN_BLOCK)
    launch(
        gather_rows_kernel, (rows, triton.cdiv(hidden, block)), x_TH.contiguous(), token_S, out_SH, hidden, BLOCK=block
    )


def combine_rows(y_SH: Tensor, position_TK: Tensor, weight_TK: Tensor | None, out_TH: Tensor) -> None:
    (tokens, top_k), hidden = position_TK.shape, y_SH.shape[1]
    block = min(triton.next_power_of_2(hidden), COLUMN_BLOCK)
    launch(
        combine_rows_kernel, (tokens, triton.cdiv(hidden, block)), y_SH, position_TK,
        position_TK if weight_TK is None else weight_TK.contiguous(), out_TH, hidden,
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
        swiglu_backward_kernel, (rows,), h_S2F, v_SF, weight_TK.contiguous(), order_S, grad_weight_TK,
        F=width, BLOCK=block, num_warps=SWIGLU_BACKWARD_WARPS,
    )  # fmt: skip


# ---- the expert cache ---------------------------------------------------------------------------------------------

PINNED: tl.constexpr = tl.constexpr(2**62)
# Enough to keep the link full (8 of them already are), few enough to leave the GPU to others.
FETCH_PROGRAMS = 32


@triton.jit
def assign_kernel(
    index_ptr, owner_ptr, used_ptr, counts_ptr, hot_ptr, slot_ptr, fetch_ptr, CHOICES, FIRST, TOTAL,
    E: tl.constexpr, C: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one layer. Experts are rows and its own slots columns of the comparisons."""
    e = tl.arange(0, EXPERTS)
    c = tl.arange(0, SLOTS)
    needed = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, CHOICES, BLOCK):
        choice = start + tl.arange(0, BLOCK)
        chosen = tl.load(index_ptr + choice, mask=choice < CHOICES, other=-1).to(tl.int32)
        needed = tl.maximum(needed, tl.max((chosen[None, :] == e[:, None]).to(tl.int32), 1))
    owner = tl.load(owner_ptr + FIRST + c, mask=c < C, other=-1)
    used = tl.load(used_ptr + FIRST + c, mask=c < C, other=PINNED)
    hot = tl.load(hot_ptr + e, mask=e < E, other=0)
    step = tl.load(counts_ptr) + 1
    holds = (owner[None, :] == e[:, None]).to(tl.int32)
    place = tl.max(tl.where(holds > 0, c[None, :], -1), 1)
    missing = tl.where(place < 0, needed, 0)
    wanted = tl.max(holds * needed[:, None], 0)
    free = tl.where((wanted == 0) & (used < PINNED), 1, 0)
    # How many free slots were used before each, ties by number: the order in which they are given away.
    earlier = (used[:, None] < used[None, :]) | ((used[:, None] == used[None, :]) & (c[:, None] < c[None, :]))
    order = tl.sum(tl.where(earlier, free[:, None], 0), 0)
    rank = tl.cumsum(missing, 0) - 1
    gives = tl.where((rank[:, None] == order[None, :]), missing[:, None] * free[None, :], 0)
    given = tl.max(tl.where(gives > 0, c[None, :], -1), 1)
    overflow = (FIRST - 1 - (rank - tl.sum(free)) + TOTAL) % TOTAL
    overflows = (missing > 0) & (given < 0)
    slot = tl.where(place >= 0, FIRST + place, tl.where(overflows, overflow, FIRST + given))
    tl.store(slot_ptr + e, tl.where(needed > 0, slot, -1).to(tl.int64), mask=e < E)
    tl.store(fetch_ptr + e, tl.where(missing > 0, slot, -1), mask=e < E)
    taken = tl.max(gives, 0)
    held = tl.maximum(holds * needed[:, None], gives)
    last = tl.where(tl.max(held * hot[:, None], 0) > 0, PINNED, step)
    tl.store(owner_ptr + FIRST + c, tl.where(taken > 0, tl.sum(gives * e[:, None], 0), owner), mask=c < C)
    tl.store(used_ptr + FIRST + c, tl.where((taken > 0) | (wanted > 0), last, used), mask=c < C)
    tl.store(owner_ptr + overflow, tl.full([EXPERTS], -1, tl.int32), mask=overflows)
    tl.store(used_ptr + overflow, tl.zeros([EXPERTS], tl.int64), mask=overflows)
    misses = tl.sum(missing)
    tl.store(counts_ptr, step)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + tl.sum(needed) - misses)
    tl.store(counts_ptr + 2, tl.load(counts_ptr + 2) + misses)


def assign_slots(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, hot: Tensor, first: int, count: int, slot: Tensor,
    fetch: Tensor,
) -> None:  # fmt: skip
    """As the operator; `slot` and `fetch` are the outputs."""
    experts = hot.numel()
    launch(
        assign_kernel, (1,), index.contiguous(), owner, used, counts, hot, slot, fetch, index.numel(), first,
        owner.numel(),
        E=experts, C=count, EXPERTS=triton.next_power_of_2(experts), SLOTS=triton.next_power_of_2(count),
        BLOCK=min(256, triton.next_power_of_2(index.numel())),
    )  # fmt: skip


@triton.jit
def copy_share(source_ptr, target_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of WORDS words."""
    for start in range(tl.program_id(0) * BLOCK, WORDS, tl.num_programs(0) * BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + word, tl.load(source_ptr + word, mask=word < WORDS), mask=word < WORDS)


@triton.jit
def fetch_kernel(fetch_ptr, hosts, slots, E: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Every program copies its share of every missing expert's tensors."""
    for expert in range(E):
        slot = tl.load(fetch_ptr + expert).to(tl.int64)
        if slot >= 0:
            for number in tl.static_range(len(WORDS)):
                copy_share(
                    hosts[number] + expert * WORDS[number], slots[number] + slot * WORDS[number], WORDS[number], BLOCK
                )


def fetch_experts(fetch: Tensor, hosts: list[Tensor], slots: list[Tensor]) -> None:
    """As the operator."""
    sources, targets = [_words(host) for host in hosts], [_words(slot) for slot in slots]
    # The kernel counts the host's words in 32 bits.
    assert all(source.numel() < 2**31 for source in sources)
    launch(
        fetch_kernel, (FETCH_PROGRAMS,), fetch, tuple(sources), tuple(targets),
        E=fetch.numel(), WORDS=tuple(source.shape[1] for source in sources), BLOCK=2048, num_warps=8,
    )  # fmt: skip


def _words(tensor: Tensor) -> Tensor:
    """[E, words] in the widest integers that an expert's bytes are whole numbers of."""
    rows = tensor.view(tensor.shape[0], -1).view(torch.uint8)
    size = rows.shape[1]
    return rows.view(torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8)
