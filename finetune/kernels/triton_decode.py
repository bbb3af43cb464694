"""Raw Triton kernels of a decoding step besides its matrix products: a handful of rows, so launches are what costs.

Each joins what would be several launches in torch: the sum of partial products with the residual stream and the norm,
the router, LoRA's update of several projections for rows of several adapters, rotary embedding with the write to the
paged cache, and attention over pages in splits (FlashDecoding) with its reduction. No atomics: the same bits each time.

Called only through the operators of `decode.py`, each of which has the same in plain torch.

Shape suffixes: T rows (one token each), S = T * K choices, H hidden, E experts, P partial sums, D head_dim.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import launch_chained, wait_for_previous
from finetune.kernels.triton_skinny_gemm import LIMIT


@triton.jit
def add_norm_kernel(
    residual_ptr, delta_ptr, weight_ptr, norm_ptr, sum_ptr, out_ptr, half_ptr, T, eps,
    H: tl.constexpr, PARTS: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: one row. residual + the weighted sum of its partial products, and the RMSNorm of that."""
    wait_for_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    total = tl.load(residual_ptr + token * H + column, mask=inside, other=0.0)
    if PARTS > 0:
        delta = tl.zeros([BLOCK], dtype=tl.float32)
        for choice in tl.static_range(TOP_K):
            y = tl.zeros([BLOCK], dtype=tl.float32)
            for part in tl.static_range(PARTS):
                row = part * T * TOP_K + token * TOP_K + choice
                y += tl.load(delta_ptr + row * H + column, mask=inside, other=0.0)
            if WEIGHTED:
                y *= tl.load(weight_ptr + token * TOP_K + choice)
            delta += y
        # Rounded where the layers of transformers round: the block's output, then the sum.
        total = (total.to(tl.float32) + delta.to(total.dtype).to(tl.float32)).to(total.dtype)
    tl.store(sum_ptr + token * H + column, total, mask=inside)
    x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / H + eps)
    normed = (x * scale).to(total.dtype).to(tl.float32)
    out = (normed * tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)).to(total.dtype)
    tl.store(out_ptr + token * H + column, out, mask=inside)
    store_half(half_ptr + token * H, column, out, inside, H)


@triton.jit
def store_half(half_ptr, column, value, mask, WIDTH: tl.constexpr):
    """fp16 with the even columns first, as `triton_skinny_gemm.py` reads a row."""
    value = tl.minimum(tl.maximum(value.to(tl.float32), -LIMIT), LIMIT)
    tl.store(half_ptr + column // 2 + (column % 2) * (WIDTH // 2), value.to(tl.float16), mask=mask)


@triton.jit
def route_kernel(
    x_ptr, gate_ptr, which_ptr, index_ptr, weight_ptr,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: one row's logits, softmax and top-k; ties go to the lower expert."""
    wait_for_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    gate_ptr += tl.load(which_ptr + token).to(tl.int64) * E * H
    column = tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    x = tl.load(x_ptr + token * H + column, mask=column < H, other=0.0)
    logits = tl.full([EXPERTS], float("-inf"), dtype=tl.float32)
    for first in range(0, E, CHUNK):
        # CHUNK rows of the router at once: one after the other, their latencies would add up.
        e = first + tl.arange(0, CHUNK)
        gate = tl.load(
            gate_ptr + e[:, None] * H + column[None, :], mask=(e < E)[:, None] & (column < H)[None, :], other=0.0
        )
        # Rounded as the router's linear layer rounds.
        logit = tl.sum(gate.to(tl.float32) * x[None, :].to(tl.float32), 1).to(gate.dtype).to(tl.float32)
        logits = tl.where(
            (expert >= first) & (expert < first + CHUNK) & (expert < E),
            tl.sum(tl.where(expert[:, None] == e[None, :], logit[None, :], 0.0), 1),
            logits,
        )
    exponents = tl.exp(logits - tl.max(logits))
    whole = tl.sum(exponents)
    # One NaN or infinity makes all of it NaN, as in torch: the weights then are NaN and the choice falls on the first
    # experts. A number past the last expert would be read out of bounds by every kernel after this one.
    probability = tl.where(whole > 0, exponents / whole, 0.0)
    total = 0.0
    remaining = probability
    for _ in tl.static_range(TOP_K):
        best = tl.max(remaining)
        total += best
        chosen = tl.min(tl.where(remaining == best, expert, EXPERTS))
        remaining = tl.where(expert == chosen, -1.0, remaining)
    remaining = probability
    for rank in tl.static_range(TOP_K):
        best = tl.max(remaining)
        chosen = tl.min(tl.where(remaining == best, expert, EXPERTS))
        remaining = tl.where(expert == chosen, -1.0, remaining)
        weight = best / total if NORMALIZE else best
        tl.store(index_ptr + token * TOP_K + rank, chosen.to(tl.int64))
        tl.store(weight_ptr + token * TOP_K + rank, tl.where(whole > 0, weight, float("nan")))


@triton.jit
def lora_shrink_kernel(
    x_ptr, a_ptr, which_ptr, out_ptr,
    IN: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: R of one row's products with the A of its adapter."""
    wait_for_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * R + tl.arange(0, R)
    adapter = tl.load(which_ptr + token).to(tl.int64)
    if adapter > 0:
        a_ptr += (adapter - 1) * RANKS * IN
        total = tl.zeros([R, BLOCK], dtype=tl.float32)
        for start in range(0, IN, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = (rank < RANKS)[:, None] & (column < IN)[None, :]
            a = tl.load(a_ptr + rank[:, None] * IN + column[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + token * IN + column, mask=column < IN, other=0.0).to(tl.float32)
            total += a * x[None, :]
        tl.store(out_ptr + token * RANKS + rank, tl.sum(total, 1), mask=rank < RANKS)


@triton.jit
def lora_expand_kernel(
    t_ptr, b_ptr, magnitude_ptr, which_ptr, segment_ptr, y_ptr, T,
    PARTS: tl.constexpr, OUT: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK outputs of one row: (y + B t) * magnitude, t of the projection that an output belongs to."""
    wait_for_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = out < OUT
    adapter = tl.load(which_ptr + token).to(tl.int64)
    if adapter > 0:
        rank = tl.arange(0, R)
        segment = tl.load(segment_ptr + out, mask=inside, other=0)
        mask = inside[:, None] & (rank < RANK)[None, :]
        b = tl.load(b_ptr + ((adapter - 1) * OUT + out)[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
        t = tl.load(t_ptr + token * RANKS + (segment * RANK)[:, None] + rank[None, :], mask=mask, other=0.0)
        update = tl.sum(b.to(tl.float32) * t, 1)
        magnitude = tl.load(magnitude_ptr + (adapter - 1) * OUT + out, mask=inside, other=0.0)
        for part in tl.static_range(PARTS):
            at = y_ptr + (part * T + token) * OUT + out
            y = tl.load(at, mask=inside, other=0.0)
            if part == 0:
                y += update
            tl.store(at, y * magnitude, mask=inside)


@triton.jit
def rope_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, page_ptr, k_ptr, v_ptr, out_ptr, pages_per_row, T,
    PARTS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    HALF: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. Queries and keys are rotated; keys and values go to their place in a page."""
    wait_for_previous(CHAINED)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(position_ptr + token)
    i = tl.arange(0, HALF)
    inside = i < D // 2
    dtype = out_ptr.dtype.element_ty
    first = tl.zeros([HALF], dtype=tl.float32)
    second = tl.zeros([HALF], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        row_ptr = qkv_ptr + ((part * T + token) * (HEADS + 2 * GROUPS) + head) * D
        first += tl.load(row_ptr + i, mask=inside, other=0.0)
        second += tl.load(row_ptr + D // 2 + i, mask=inside, other=0.0)
    first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    if head < HEADS + GROUPS:
        cos = tl.load(cos_ptr + position * D + i, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * D + i, mask=inside, other=0.0).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
    page = tl.load(page_ptr + token * pages_per_row + position // PAGE).to(tl.int64)
    if head < HEADS:
        target = out_ptr + (token * HEADS + head) * D
    elif head < HEADS + GROUPS:
        target = k_ptr + ((page * PAGE + position % PAGE) * GROUPS + head - HEADS) * D
    else:
        target = v_ptr + ((page * PAGE + position % PAGE) * GROUPS + head - HEADS - GROUPS) * D
    tl.store(target + i, first.to(dtype), mask=inside)
    tl.store(target + D // 2 + i, second.to(dtype), mask=inside)


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, page_ptr, position_ptr, sum_ptr, stats_ptr, scale, pages_per_row, window,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, Q: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one key head of one row, over one split of its pages."""
    wait_for_previous(CHAINED)
    token, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    per_group: tl.constexpr = HEADS // GROUPS
    length = tl.load(position_ptr + token) + 1
    begin = tl.maximum(length - window, 0)
    first_page = begin // PAGE
    pages = tl.cdiv(length, PAGE) - first_page
    share = tl.cdiv(pages, SPLITS)
    first = first_page + split * share
    last = tl.minimum(first + share, first_page + pages)
    head = tl.arange(0, Q)
    d = tl.arange(0, DIM)
    key = tl.arange(0, PAGE)
    q_mask = (head < per_group)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (token * HEADS + group * per_group + head)[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    best = tl.full([Q], float("-inf"), dtype=tl.float32)
    total = tl.zeros([Q], dtype=tl.float32)
    out = tl.zeros([Q, DIM], dtype=tl.float32)
    for number in range(first, last):
        page = tl.load(page_ptr + token * pages_per_row + number).to(tl.int64)
        row = ((page * PAGE + key) * GROUPS + group) * D
        k = tl.load(k_ptr + row[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
        position = number * PAGE + key
        visible = (position < length) & (position >= begin)
        score = tl.where(visible[None, :], tl.dot(q, k) * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp(score - shift[:, None])
        keep = tl.exp(best - shift)
        # Rows of a page that nobody has written may hold anything.
        v = tl.load(v_ptr + row[:, None] + d[None, :], mask=visible[:, None] & (d < D)[None, :], other=0.0)
        total = total * keep + tl.sum(weight, 1)
        out = out * keep[:, None] + tl.dot(weight.to(v.dtype), v)
        best = new_best
    at = (token * HEADS + group * per_group + head) * SPLITS + split
    tl.store(sum_ptr + at[:, None] * D + d[None, :], out, mask=q_mask)
    tl.store(stats_ptr + at * 2, best, mask=head < per_group)
    tl.store(stats_ptr + at * 2 + 1, total, mask=head < per_group)


@triton.jit
def merge_splits_kernel(
    sum_ptr, stats_ptr, out_ptr, half_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row; the splits' sums joined by their maxima."""
    wait_for_previous(CHAINED)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM)
    at = (token * HEADS + head) * SPLITS + split
    best = tl.load(stats_ptr + at * 2)
    factor = tl.exp(best - tl.max(best))
    total = tl.sum(tl.load(stats_ptr + at * 2 + 1) * factor)
    parts = tl.load(sum_ptr + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    out = (tl.sum(parts * factor[:, None], 0) / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * HEADS + head) * D + d, out, mask=d < D)
    store_half(half_ptr + token * HEADS * D, head * D + d, out, d < D, HEADS * D)


# ---- launches ----------------------------------------------------------------------------------------------------

MAX_SPLITS = 32
# So many programs of attention keep an H100 busy.
ATTENTION_PROGRAMS = 256
NORM_WARPS, ROUTE_WARPS, ATTENTION_WARPS = 32, 8, 4


def add_norm(
    residual_TH: Tensor, delta_PSH: Tensor, weight_TK: Tensor | None, norm_H: Tensor, eps: float, sum_TH: Tensor,
    out_TH: Tensor, half_TH: Tensor,
) -> None:  # fmt: skip
    tokens, hidden = residual_TH.shape
    launch_chained(
        add_norm_kernel, (tokens,), residual_TH, delta_PSH, delta_PSH if weight_TK is None else weight_TK, norm_H,
        sum_TH, out_TH, half_TH, tokens, eps,
        H=hidden, PARTS=delta_PSH.shape[0], TOP_K=1 if weight_TK is None else weight_TK.shape[1],
        WEIGHTED=weight_TK is not None, BLOCK=triton.next_power_of_2(hidden), num_warps=NORM_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def route(
    x_TH: Tensor, gate_NEH: Tensor, which_T: Tensor, top_k: int, normalize: bool, index_TK: Tensor, weight_TK: Tensor
) -> None:
    experts, hidden = gate_NEH.shape[1:]
    launch_chained(
        route_kernel, (x_TH.shape[0],), x_TH, gate_NEH, which_T, index_TK, weight_TK,
        H=hidden, E=experts, TOP_K=top_k, NORMALIZE=normalize, BLOCK=triton.next_power_of_2(hidden),
        EXPERTS=triton.next_power_of_2(experts), CHUNK=min(8, triton.next_power_of_2(experts)), num_warps=ROUTE_WARPS,
    )  # fmt: skip


def lora_rows(
    y_PTO: Tensor, x_TI: Tensor, a_NRI: Tensor, b_NOR: Tensor, magnitude_NO: Tensor, segment_O: Tensor, which_T: Tensor
) -> None:
    (parts, tokens, out), in_ = y_PTO.shape, x_TI.shape[1]
    ranks, rank = a_NRI.shape[1], b_NOR.shape[2]
    t_TR = torch.empty(tokens, ranks, dtype=torch.float32, device=x_TI.device)
    launch_chained(
        lora_shrink_kernel, (tokens, triton.cdiv(ranks, 4)), x_TI, a_NRI, which_T, t_TR,
        IN=in_, RANKS=ranks, R=4, BLOCK=min(1024, triton.next_power_of_2(in_)),
    )  # fmt: skip
    launch_chained(
        lora_expand_kernel, (tokens, triton.cdiv(out, 128)), t_TR, b_NOR, magnitude_NO, which_T, segment_O, y_PTO,
        tokens,
        PARTS=parts, OUT=out, RANKS=ranks, RANK=rank, R=triton.next_power_of_2(rank), BLOCK=128,
    )  # fmt: skip


def rope_write(
    qkv_PTO: Tensor, cos_LD: Tensor, sin_LD: Tensor, position_T: Tensor, page_TP: Tensor, k: Tensor, v: Tensor,
    heads: int, q: Tensor,
) -> None:  # fmt: skip
    (tokens, _, dim), (_, page, groups, _) = q.shape, k.shape
    launch_chained(
        rope_write_kernel, (tokens, heads + 2 * groups), qkv_PTO, cos_LD, sin_LD, position_T, page_TP, k, v, q,
        page_TP.shape[1], tokens,
        PARTS=qkv_PTO.shape[0], HEADS=heads, GROUPS=groups, D=dim, PAGE=page, HALF=triton.next_power_of_2(dim // 2),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def paged_attention(
    q_THD: Tensor, k: Tensor, v: Tensor, page_TP: Tensor, position_T: Tensor, scale: float, window: int, out: Tensor,
    half: Tensor,
) -> None:  # fmt: skip
    (tokens, heads, dim), (_, page, groups, _) = q_THD.shape, k.shape
    wanted = triton.next_power_of_2(triton.cdiv(ATTENTION_PROGRAMS, tokens * groups))
    splits = min(MAX_SPLITS, wanted, triton.next_power_of_2(page_TP.shape[1]))
    sums = torch.empty(tokens, heads, splits, dim, dtype=torch.float32, device=q_THD.device)
    stats = torch.empty(tokens, heads, splits, 2, dtype=torch.float32, device=q_THD.device)
    shape = {"HEADS": heads, "D": dim, "DIM": max(16, triton.next_power_of_2(dim)), "SPLITS": splits}
    launch_chained(
        paged_attention_kernel, (tokens, groups, splits), q_THD, k, v, page_TP, position_T, sums, stats, scale,
        page_TP.shape[1], window,
        GROUPS=groups, PAGE=page, Q=max(16, triton.next_power_of_2(heads // groups)), **shape,
        num_warps=ATTENTION_WARPS,
    )  # fmt: skip
    launch_chained(merge_splits_kernel, (tokens, heads), sums, stats, out, half, **shape, num_warps=1)
