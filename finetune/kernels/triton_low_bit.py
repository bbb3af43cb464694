"""Raw Triton kernels that multiply few rows (decoding: 1 to 64) with 2- and 3-bit matrices without writing them out.

As `triton_skinny_gemm.py` does with NF4, whose rows, intermediate rows and partial sums these share. What differs:

- A code becomes fp16 without a table (`triton_codes.py`). Compiled for sm_90 (triton 3.9), the loop of a vector
  product is 44 instructions for 16 weights of 2 bits and 60 of 3, where NF4's is 93; on the tensor cores, at 8 rows,
  57 and 83, where NF4's is 72.
- A few choices: codes are multiplied less 2^(BITS - 1) and times 2^-BITS, so that eight products of fp16 stay below
  65,504. What the zero adds is 2^(BITS - 1) - z times the sum of the group's columns, once for a program's outputs.
- More choices: the weight itself, s (q - z), rounded to fp16 once, on the tensor cores.

Leaves out: gradients, and many rows, where dequantizing once wins (`expert_operation.py`).

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

from finetune.kernels.packed_experts import LowBitWeights
from finetune.kernels.triton_codes import dot16, fp16_weights, high_bits, sum16, unpack_affine
from finetune.kernels.triton_launch import ASSEMBLY, wait_for_previous
from finetune.kernels.triton_skinny_gemm import SHRINK, Format, Product, store_act

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
            third = tl.load(third_ptr + pair * 8, mask=(pair * 8 + w < GROUPS * 4)[None, :], other=0)
            third = third.to(tl.int32) & 0xFFFF
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


# ---- launches ----------------------------------------------------------------------------------------------------

# Chosen by counting instructions and bytes in flight, from what was best for NF4.
VECTOR_GATE_UP = {"R": 2, "NB": 32, "num_warps": 1}
VECTOR_DOWN = {"R": 4, "NB": 32, "num_warps": 1}
MATRIX_GATE_UP = {"BN": 16, "STAGES": 3, "num_warps": 1}
MATRIX_DOWN = {"BN": 32, "STAGES": 3, "num_warps": 1}
WIDE_GATE_UP = {"BN": 32, "STAGES": 3, "num_warps": 2}
WIDE_DOWN = {"BN": 32, "STAGES": 3, "num_warps": 1}


def _arguments(weights: LowBitWeights, vector: bool) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The codes, the same as 16-bit words for the third bits, and scales with zeros as one int32 each."""
    packed = weights.packed
    pointers = (
        packed.view(torch.int32) if vector else packed,
        packed.view(torch.int16),
        weights.affine.view(torch.int32),
    )
    return pointers, {"GROUPS": weights.affine.shape[2], "BITS": weights.bits, "ASSEMBLY": ASSEMBLY}


LOW_BIT = Format(
    Product(vector_gate_up_kernel, VECTOR_GATE_UP, gate_up_kernel, MATRIX_GATE_UP, WIDE_GATE_UP),
    Product(vector_down_kernel, VECTOR_DOWN, down_kernel, MATRIX_DOWN, WIDE_DOWN),
    _arguments,
)
