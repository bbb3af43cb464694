"""Raw Triton kernels that multiply few rows (decoding: 1 to 64) with 2- and 3-bit matrices without writing them out.

As `triton_skinny_gemm.py` does with NF4, whose rows, intermediate rows and partial sums these share. What differs:

- A code becomes fp16 without a table (`triton_low_bit_codes.py`). Compiled for sm_90 (triton 3.9), the loop of a vector
  product is 44 instructions for 16 weights of 2 bits and 60 of 3, where NF4's is 93; on the tensor cores, at 8 rows,
  57 and 83, where NF4's is 72.
- A few choices: codes are multiplied less 2^(BITS - 1) and times 2^-BITS, so that eight products of fp16 stay below
  65,504. What the zero adds is 2^(BITS - 1) - z times the sum of the group's columns, once for a program's outputs.
- More choices: the weight itself, s (q - z), rounded to fp16 once, on the tensor cores.

Leaves out: gradients, and many rows, where dequantizing once wins (`experts_matmul.py`).

Shape suffixes: S rows sorted by expert, I a matrix's input, O its output, F intermediate, G groups of 64 columns.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import ASSEMBLY, launch, launch_chained, tile_rows, wait_for_previous
from finetune.kernels.triton_low_bit_codes import dot16, fp16_weights, high_bits, sum16, unpack_affine
from finetune.kernels.triton_skinny_gemm import SHRINK, store_act

# ---- few choices: the vector units -------------------------------------------------------------------------------


@triton.jit
def vector_product(
    words_ptr, thirds_ptr, affine_ptr, x_ptr, n, first, last,
    GROUPS: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, WHOLE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """float32 [R]: outputs `n` of one matrix for one row at `x_ptr`, int64 words of four fp16 columns.

    WHOLE: the groups `first` to `last` are whole rounds of NB, so nothing is masked.
    """
    total = tl.zeros([R, NB], dtype=tl.float32)
    w = tl.arange(0, 4)
    for start in range(first, last, NB):
        group = start + tl.arange(0, NB)
        word = group[:, None] * 4 + w[None, :]
        x_at = x_ptr + group[:, None] * 8 + w[None, :]
        low_at = words_ptr + n[:, None, None] * (GROUPS * 2 * BITS) + word[None, :, :]
        affine_at = affine_ptr + n[:, None] * GROUPS + group[None, :]
        inside = group < last
        if WHOLE:
            even0, even1 = tl.load(x_at), tl.load(x_at + 4)
            odd0, odd1 = tl.load(x_at + GROUPS * 8), tl.load(x_at + GROUPS * 8 + 4)
            low, affine = tl.load(low_at), tl.load(affine_at)
        else:
            even0 = tl.load(x_at, mask=inside[:, None], other=0)
            even1 = tl.load(x_at + 4, mask=inside[:, None], other=0)
            odd0 = tl.load(x_at + GROUPS * 8, mask=inside[:, None], other=0)
            odd1 = tl.load(x_at + GROUPS * 8 + 4, mask=inside[:, None], other=0)
            low = tl.load(low_at, mask=inside[None, :, None], other=0)
            affine = tl.load(affine_at, mask=inside[None, :], other=0)
        high = low
        if BITS == 3:
            high_at = thirds_ptr + n[:, None, None] * (GROUPS * 12) + GROUPS * 8 + word[None, :, :]
            high = tl.load(high_at, mask=inside[None, :, None], other=0).to(tl.int32) & 0xFFFF
        x_sum = tl.sum(sum16(even0, even1, odd0, odd1, ASSEMBLY), 1)
        even0, _ = tl.broadcast(even0[None, :, :], low)
        even1, _ = tl.broadcast(even1[None, :, :], low)
        odd0, _ = tl.broadcast(odd0[None, :, :], low)
        odd1, _ = tl.broadcast(odd1[None, :, :], low)
        part = tl.sum(dot16(low, high, even0, even1, odd0, odd1, BITS, ASSEMBLY), 2)
        scale, zero = unpack_affine(affine)
        total += scale * (part * 2**BITS + (2 ** (BITS - 1) - zero) * (8 * x_sum)[None, :])
    return tl.sum(total, 1)


@triton.jit
def vector_gate_up_kernel(
    words_ptr, thirds_ptr, affine_ptr, x_ptr, index_ptr, out_ptr,
    TOP_K: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    R: tl.constexpr, NB: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: R intermediate columns of one choice: silu(gate) * up."""
    wait_for_previous(CHAINED)
    choice = tl.program_id(1)
    column = tl.program_id(0) * R + tl.arange(0, R)
    i = tl.arange(0, 2 * R)
    n = (i % 2) * F + tl.minimum(tl.program_id(0) * R + i // 2, F - 1)
    expert = tl.load(index_ptr + choice)
    both = vector_product(
        words_ptr + expert * (2 * F * GROUPS * 2 * BITS), thirds_ptr + expert * (2 * F * GROUPS * 4 * BITS),
        affine_ptr + expert * (2 * F * GROUPS), x_ptr + (choice // TOP_K) * (GROUPS * 16), n, 0, GROUPS,
        GROUPS, BITS, 2 * R, NB, (GROUPS // NB) * NB == GROUPS, ASSEMBLY,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(both, [R, 2]))
    store_act(out_ptr + choice * F, column, gate, up, column < F, F)


@triton.jit
def vector_down_kernel(
    words_ptr, thirds_ptr, affine_ptr, x_ptr, index_ptr, out_ptr, S,
    OUT: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
    NB: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: R outputs of one choice over one split of the columns."""
    wait_for_previous(CHAINED)
    choice, split = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.load(index_ptr + choice)
    share: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    whole: tl.constexpr = (share // NB) * NB * SPLITS == GROUPS
    y = vector_product(
        words_ptr + expert * (OUT * GROUPS * 2 * BITS), thirds_ptr + expert * (OUT * GROUPS * 4 * BITS),
        affine_ptr + expert * (OUT * GROUPS), x_ptr + choice * (GROUPS * 16), tl.minimum(n, OUT - 1),
        split * share, tl.minimum((split + 1) * share, GROUPS), GROUPS, BITS, R, NB, whole, ASSEMBLY,
    )  # fmt: skip
    tl.store(out_ptr + (split * S + choice) * OUT + n, y / SHRINK, mask=n < OUT)


# ---- more choices: the tensor cores ------------------------------------------------------------------------------


@triton.jit
def product(
    packed_ptr, thirds_ptr, affine_ptr, x_ptr, row_mask, n, first, last,
    GROUPS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: outputs `n` of one matrix for the BM rows at `x_ptr`, over pairs of groups.

    Pairs, because a tensor core's product of four-byte pieces is 32 columns deep.
    """
    byte = tl.arange(0, 32)
    w = tl.arange(0, 8)
    whole: tl.constexpr = GROUPS % 2 == 0
    low_ptr = packed_ptr + n.to(tl.int64)[:, None] * (GROUPS * 8 * BITS) + byte[None, :]
    third_ptr = thirds_ptr + n.to(tl.int64)[:, None] * (GROUPS * 4 * BITS) + GROUPS * 8 + w[None, :]
    x_ptr = x_ptr[None, :] + (byte // 16 * 32 + byte % 16)[:, None]
    total = tl.zeros([BN, BM], dtype=tl.float32)
    for pair in tl.range(first, last, num_stages=STAGES):
        affine_at = affine_ptr + n * GROUPS + pair * 2
        x_mask = row_mask[None, :]
        if whole:
            low = tl.load(low_ptr + pair * 32)
            second_affine = tl.load(affine_at + 1)
        else:
            # Of the last pair, there is but one: zeros have no weight.
            low = tl.load(low_ptr + pair * 32, mask=(pair * 32 + byte < GROUPS * 16)[None, :], other=0)
            second_affine = tl.load(affine_at + 1, mask=pair * 2 + 1 < GROUPS, other=0)
            x_mask = x_mask & (pair * 32 + byte < GROUPS * 16)[:, None]
        high = low
        if BITS == 3:
            third = (
                tl.load(third_ptr + pair * 8, mask=(pair * 8 + w < GROUPS * 4)[None, :], other=0).to(tl.int32) & 0xFFFF
            )
            high = tl.reshape(high_bits(third[:, :, None], tl.arange(0, 4)[None, None, :]), [BN, 32]).to(tl.uint8)
        affine = tl.where((byte < 16)[None, :], tl.load(affine_at)[:, None], second_affine[:, None])
        scale, zero = unpack_affine(affine)
        offset = (scale * (2 ** (BITS - 1) - zero)).to(tl.float16)
        w0, w1, w2, w3 = fp16_weights(low, high, scale.to(tl.float16), offset, BITS, ASSEMBLY)
        x_at = x_ptr + pair * 64
        total = tl.dot(w0, tl.load(x_at, mask=x_mask, other=0.0), total)
        total = tl.dot(w1, tl.load(x_at + 16, mask=x_mask, other=0.0), total)
        total = tl.dot(w2, tl.load(x_at + GROUPS * 32, mask=x_mask, other=0.0), total)
        total = tl.dot(w3, tl.load(x_at + GROUPS * 32 + 16, mask=x_mask, other=0.0), total)
    return total


@triton.jit
def gate_up_kernel(
    packed_ptr, thirds_ptr, affine_ptr, x_ptr, order_ptr, end_ptr, out_ptr,
    TOP_K: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BN intermediate columns of one expert for all of its rows: silu(gate) * up.

    Gate's and up's outputs alternate in one product, so both read a row once.
    """
    wait_for_previous(CHAINED)
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.arange(0, 2 * BN)
    n = (i % 2) * F + tl.minimum(tl.program_id(0) * BN + i // 2, F - 1)
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    packed_ptr += expert * (2 * F * GROUPS * 8 * BITS)
    thirds_ptr += expert * (2 * F * GROUPS * 4 * BITS)
    affine_ptr += expert * (2 * F * GROUPS)
    for first_row in range(start, end, BM):
        row = first_row + tl.arange(0, BM)
        mask = row < end
        choice = tl.load(order_ptr + row, mask=mask, other=0)
        both = product(
            packed_ptr, thirds_ptr, affine_ptr, x_ptr + (choice // TOP_K) * (GROUPS * 64), mask, n, 0,
            (GROUPS + 1) // 2, GROUPS, BITS, 2 * BN, BM, STAGES, ASSEMBLY,
        )  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(both, [BN, 2, BM]), (0, 2, 1)))
        store_act(out_ptr + choice[None, :] * F, column[:, None], gate, up, mask[None, :] & (column < F)[:, None], F)


@triton.jit
def down_kernel(
    packed_ptr, thirds_ptr, affine_ptr, x_ptr, order_ptr, end_ptr, out_ptr, S,
    OUT: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of one expert for all of its rows, over one split of the columns."""
    wait_for_previous(CHAINED)
    expert, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    packed_ptr += expert * (OUT * GROUPS * 8 * BITS)
    thirds_ptr += expert * (OUT * GROUPS * 4 * BITS)
    affine_ptr += expert * (OUT * GROUPS)
    pairs: tl.constexpr = (GROUPS + 1) // 2
    share: tl.constexpr = (pairs + SPLITS - 1) // SPLITS
    for first_row in range(start, end, BM):
        row = first_row + tl.arange(0, BM)
        mask = row < end
        choice = tl.load(order_ptr + row, mask=mask, other=0)
        y = product(
            packed_ptr, thirds_ptr, affine_ptr, x_ptr + choice * (GROUPS * 64), mask, tl.minimum(n, OUT - 1),
            tl.minimum(split * share, pairs), tl.minimum((split + 1) * share, pairs),
            GROUPS, BITS, BN, BM, STAGES, ASSEMBLY,
        )  # fmt: skip
        out = out_ptr + (split * S + choice)[None, :] * OUT + n[:, None]
        tl.store(out, y / SHRINK, mask=mask[None, :] & (n < OUT)[:, None])


# ---- whole matrices ----------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    words_ptr, thirds_ptr, affine_ptr, out_ptr, words_per_matrix,
    GROUPS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program: WORDS words of 16 weights of one matrix: columns 8 w to 8 w + 7 of a group, and 32 further."""
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words_per_matrix
    row, rest = word // (GROUPS * 4), word % (GROUPS * 4)
    rows = matrix * (words_per_matrix // (GROUPS * 4)) + row
    scale, zero = unpack_affine(tl.load(affine_ptr + rows * GROUPS + rest // 4, mask=inside, other=0))
    # A row of 3 bits is GROUPS * 4 words of low bits and half as many of third bits.
    low = tl.load(words_ptr + rows * (GROUPS * 2 * BITS) + rest, mask=inside, other=0)
    j = tl.arange(0, 8)
    nibble = low[:, None] >> (4 * j)[None, :]
    first, second = nibble & 3, (nibble >> 2) & 3
    if BITS == 3:
        high = (
            tl.load(thirds_ptr + rows * (GROUPS * 12) + GROUPS * 8 + rest, mask=inside, other=0).to(tl.int32) & 0xFFFF
        )
        third = high_bits(high[:, None], (j // 2)[None, :]) >> (4 * (j % 2))[None, :]
        first, second = first | (third & 1) << 2, second | ((third >> 2) & 1) << 2
    column = (rest // 4) * 64 + (rest % 4) * 8
    out = out_ptr + rows[:, None] * (GROUPS * 64) + column[:, None] + j[None, :]
    value = (first.to(tl.float32) - zero[:, None]) * scale[:, None]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    value = (second.to(tl.float32) - zero[:, None]) * scale[:, None]
    tl.store(out + 32, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


# ---- launches ----------------------------------------------------------------------------------------------------

# Chosen by counting instructions and bytes in flight, from what was best for NF4.
VECTOR_GATE_UP = {"R": 2, "NB": 32, "num_warps": 1}
VECTOR_DOWN = {"R": 4, "NB": 32, "num_warps": 1}
MATRIX_GATE_UP = {"BN": 16, "STAGES": 3, "num_warps": 1}
MATRIX_DOWN = {"BN": 32, "STAGES": 3, "num_warps": 1}
WIDE_GATE_UP = {"BN": 32, "STAGES": 3, "num_warps": 2}
WIDE_DOWN = {"BN": 32, "STAGES": 3, "num_warps": 1}
DEQUANTIZE_WORDS, DEQUANTIZE_WARPS = 256, 4


def dequantize(packed: Tensor, affine: Tensor, out: Tensor) -> None:
    """Writes `out` [E, O, I]: `packed` uint8 [E, O, bytes], `affine` fp16 [E, O, G, 2]."""
    (experts, rows, groups, _), bits = affine.shape, packed.shape[2] * 8 // out.shape[2]
    words = rows * groups * 4
    grid = (triton.cdiv(words, DEQUANTIZE_WORDS), experts)
    launch(
        dequantize_kernel, grid, packed.view(torch.int32), packed.view(torch.int16), affine.view(torch.int32), out,
        words,
        GROUPS=groups, BITS=bits, WORDS=DEQUANTIZE_WORDS, num_warps=DEQUANTIZE_WARPS,
    )  # fmt: skip


def gate_up(
    packed: Tensor, affine: Tensor, x_TH: Tensor, index_TK: Tensor, order_S: Tensor | None, end_E: Tensor | None,
    out_SF: Tensor,
) -> None:  # fmt: skip
    """Writes fp16 `out` [S, F] in the order of the choices, even columns first, times SHRINK.

    Arguments as `triton_skinny_gemm.gate_up`, with the tensors of a `LowBitWeights`.
    """
    count, width = out_SF.shape
    experts, _, groups, _ = affine.shape
    options = {"F": width, "TOP_K": index_TK.shape[1], **_format(packed, groups)}
    thirds, scales = packed.view(torch.int16), affine.view(torch.int32)
    if order_S is None:
        tile = VECTOR_GATE_UP
        grid = (triton.cdiv(width, tile["R"]), count)
        launch_chained(vector_gate_up_kernel, grid, packed.view(torch.int32), thirds, scales, x_TH.view(torch.int64),
                       index_TK, out_SF, **options, **tile)  # fmt: skip
        return
    block = tile_rows(count, experts)
    tile = MATRIX_GATE_UP if block == 8 else WIDE_GATE_UP
    grid = (triton.cdiv(width, tile["BN"]), experts)
    launch_chained(gate_up_kernel, grid, packed, thirds, scales, x_TH, order_S, end_E, out_SF, BM=block,
                   **options, **tile)  # fmt: skip


def down(
    packed: Tensor, affine: Tensor, x_SF: Tensor, index_TK: Tensor, order_S: Tensor | None, end_E: Tensor | None,
    out_PSH: Tensor,
) -> None:  # fmt: skip
    """Writes float32 `out` [P, S, H], P splits to be added, in the order of the choices; arguments as `gate_up`."""
    splits, count, out = out_PSH.shape
    experts, _, groups, _ = affine.shape
    options = {"OUT": out, "SPLITS": splits, **_format(packed, groups)}
    thirds, scales = packed.view(torch.int16), affine.view(torch.int32)
    if order_S is None:
        tile = VECTOR_DOWN
        grid = (triton.cdiv(out, tile["R"]), count, splits)
        launch_chained(vector_down_kernel, grid, packed.view(torch.int32), thirds, scales, x_SF.view(torch.int64),
                       index_TK, out_PSH, count, **options, **tile)  # fmt: skip
        return
    block = tile_rows(count, experts)
    tile = MATRIX_DOWN if block == 8 else WIDE_DOWN
    grid = (triton.cdiv(out, tile["BN"]), experts, splits)
    launch_chained(down_kernel, grid, packed, thirds, scales, x_SF, order_S, end_E, out_PSH, count, BM=block,
                   **options, **tile)  # fmt: skip


def _format(packed: Tensor, groups: int) -> dict[str, Any]:
    return {"GROUPS": groups, "BITS": packed.shape[2] // (8 * groups), "ASSEMBLY": ASSEMBLY}
