"""Raw Triton kernels that multiply few rows (decoding: 1 to 64) with NF4 matrices without writing them out.

At so few rows a product costs what reading its weights costs, 0.52 bytes a weight instead of the 2.5 of dequantizing
first. Decoding 4e12 weights a second (H100), about five instructions each, must not be what is waited for:

- Packed bytes become fp16 codes without a load (`triton_codes.py`). The codes are exact to 2^-12, and their scale is
  applied in float32 to the sums over 64 of them: nearer to the float64 product than bf16 weights are.
- One or two rows multiply as pairs of fp16 in the vector units; more rows share their expert's weights on the fp16
  tensor cores. A row lies with its even columns first, as a byte holds two: no interleaving.
- Rows come as fp16, clamped to `LIMIT`: exact for bf16 values between 6e-5 and 16,000, where normed rows lie. The
  experts' intermediate rows are kept times `SHRINK`, which moves that range to 0.004 to 1e6.
- A row's products over splits of the columns are added by the kernel that needs the sum, in a fixed order.

Gate and up of eight experts for 16 tokens take 240 us on an H100: 213 with the decoding left out, and 155 to 172 to
read the same bytes and nothing else. Tried without gain: a table of byte pairs in shared memory (267 us), tables in
registers (240), shifts as multiplications (244), four scales at once in a batched `tl.dot` (250), rows by L1 (244).

Leaves out gradients, and many rows (`expert_operation.py`).
Shape suffixes: S rows sorted by expert, I a matrix's input, O its output, F intermediate.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.nf4 import NESTED_BLOCK, Nf4Weights, code_of, dynamic_map
from finetune.kernels.triton_codes import decode, dot8
from finetune.kernels.triton_launch import ASSEMBLY, launch_chained, tile_rows, wait_for_previous

# The columns that one scale serves, as bytes.
BLOCK_BYTES = tl.constexpr(32)
SHRINK = tl.constexpr(1 / 64)
LIMIT = tl.constexpr(16000.0)


@triton.jit
def product(
    packed_ptr, absmax_ptr, nested_ptr, offset, code_ptr, map_ptr, x_ptr, row_mask, n, first, last,
    BYTES: tl.constexpr, NESTED_BLOCK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    STAGES: tl.constexpr, UNROLL: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: outputs `n` of one matrix for the BM rows at `x_ptr`, over the scales `first` to `last`.

    UNROLL 4 reads four scales as one word; both bounds are then multiples of four. They are read a round ahead: their
    dependent loads would otherwise be waited for in every round.
    """
    per_row: tl.constexpr = BYTES // BLOCK_BYTES
    byte = tl.arange(0, BLOCK_BYTES)
    weight_ptr = packed_ptr + n.to(tl.int64)[:, None] * BYTES + byte[None, :]
    if UNROLL == 4:
        scale_ptr = absmax_ptr.to(tl.pointer_type(tl.int32)) + n * (per_row // 4)
    else:
        scale_ptr = absmax_ptr + n * per_row
    begin = tl.minimum(first, per_row - UNROLL)  # a last split may be empty
    absmax = tl.load(scale_ptr + begin // UNROLL).to(tl.int32)
    nested = tl.load(nested_ptr + (n * per_row + begin) // NESTED_BLOCK)
    total = tl.zeros([BN, BM], dtype=tl.float32)
    for group in tl.range(first // UNROLL, last // UNROLL, num_stages=STAGES):
        ahead = tl.minimum(group + 1, per_row // UNROLL - 1)
        next_absmax = tl.load(scale_ptr + ahead).to(tl.int32)
        if (NESTED_BLOCK // per_row) * per_row == NESTED_BLOCK:
            next_nested = nested  # a row's scales share it
        else:
            next_nested = tl.load(nested_ptr + (n * per_row + ahead * UNROLL) // NESTED_BLOCK)
        for step in tl.static_range(UNROLL):
            block = group * UNROLL + step
            packed = tl.load(weight_ptr + block * BLOCK_BYTES)
            odd, even = decode(packed, code_ptr, ASSEMBLY)
            column = block * BLOCK_BYTES + byte[:, None]
            x_even = tl.load(x_ptr[None, :] + column, mask=row_mask[None, :], other=0.0)
            x_odd = tl.load(x_ptr[None, :] + BYTES + column, mask=row_mask[None, :], other=0.0)
            scale = tl.load(map_ptr + ((absmax >> (8 * step)) & 0xFF)) * nested + offset
            total += tl.dot(odd, x_odd, tl.dot(even, x_even)) * scale[:, None]
        absmax, nested = next_absmax, next_nested
    return total


@triton.jit
def pick(segment, a, b, c):
    """The pointer of this segment."""
    if segment == 0:
        chosen = a
    elif segment == 1:
        chosen = b
    else:
        chosen = c
    return chosen


@triton.jit
def dense_kernel(
    packed0, packed1, packed2, absmax0, absmax1, absmax2, nested0, nested1, nested2, offset0, offset1, offset2,
    code_ptr, map_ptr, x_ptr, out_ptr, S,
    END0: tl.constexpr, END1: tl.constexpr, OUT: tl.constexpr, BYTES: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of one of up to three matrices for all rows, over one split of the columns."""
    wait_for_previous(CHAINED)
    first_out, split = tl.program_id(0) * BN, tl.program_id(1)
    segment = (first_out >= END0).to(tl.int32) + (first_out >= END1).to(tl.int32)
    n = first_out + tl.arange(0, BN)
    local = n - tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    blocks: tl.constexpr = BYTES // BLOCK_BYTES
    share: tl.constexpr = (blocks // UNROLL + SPLITS - 1) // SPLITS * UNROLL
    for first_row in range(0, S, BM):
        row = first_row + tl.arange(0, BM)
        y = product(
            pick(segment, packed0, packed1, packed2), pick(segment, absmax0, absmax1, absmax2),
            pick(segment, nested0, nested1, nested2), tl.load(pick(segment, offset0, offset1, offset2)),
            code_ptr, map_ptr, x_ptr + row * (2 * BYTES), row < S, local,
            tl.minimum(split * share, blocks), tl.minimum((split + 1) * share, blocks),
            BYTES, NESTED_BLOCK, BN, BM, STAGES, UNROLL, ASSEMBLY,
        )  # fmt: skip
        tl.store(out_ptr + (split * S + row)[None, :] * OUT + n[:, None], y, mask=(row < S)[None, :])


@triton.jit
def down_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr, map_ptr, x_ptr, order_ptr, end_ptr, out_ptr, S,
    OUT: tl.constexpr, BYTES: tl.constexpr, NESTED_BLOCK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of one expert for all of its rows, over one split of the columns."""
    wait_for_previous(CHAINED)
    expert, split = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    blocks: tl.constexpr = BYTES // BLOCK_BYTES
    packed_ptr += expert.to(tl.int64) * OUT * BYTES
    absmax_ptr += expert.to(tl.int64) * OUT * blocks
    nested_ptr += expert * ((OUT * blocks + NESTED_BLOCK - 1) // NESTED_BLOCK)
    offset = tl.load(offset_ptr + expert)
    share: tl.constexpr = (blocks // UNROLL + SPLITS - 1) // SPLITS * UNROLL
    for first_row in range(start, end, BM):
        row = first_row + tl.arange(0, BM)
        mask = row < end
        choice = tl.load(order_ptr + row, mask=mask, other=0)
        y = product(
            packed_ptr, absmax_ptr, nested_ptr, offset, code_ptr, map_ptr, x_ptr + choice * (2 * BYTES), mask,
            tl.minimum(n, OUT - 1), tl.minimum(split * share, blocks), tl.minimum((split + 1) * share, blocks),
            BYTES, NESTED_BLOCK, BN, BM, STAGES, UNROLL, ASSEMBLY,
        )  # fmt: skip
        out = out_ptr + (split * S + choice)[None, :] * OUT + n[:, None]
        tl.store(out, y / SHRINK, mask=mask[None, :] & (n < OUT)[:, None])


@triton.jit
def gate_up_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr, map_ptr, x_ptr, order_ptr, end_ptr, out_ptr,
    TOP_K: tl.constexpr, F: tl.constexpr, BYTES: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, ASSEMBLY: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BN intermediate columns of one expert for all of its rows: silu(gate) * up.

    Gate's and up's outputs alternate in one product, so both read a row once.
    """
    wait_for_previous(CHAINED)
    expert = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.arange(0, 2 * BN)
    n = (i % 2) * F + tl.minimum(tl.program_id(0) * BN + i // 2, F - 1)
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    per_matrix: tl.constexpr = 2 * F * (BYTES // BLOCK_BYTES)
    packed_ptr += expert.to(tl.int64) * 2 * F * BYTES
    absmax_ptr += expert.to(tl.int64) * per_matrix
    nested_ptr += expert * ((per_matrix + NESTED_BLOCK - 1) // NESTED_BLOCK)
    offset = tl.load(offset_ptr + expert)
    for first_row in range(start, end, BM):
        row = first_row + tl.arange(0, BM)
        mask = row < end
        choice = tl.load(order_ptr + row, mask=mask, other=0)
        both = product(
            packed_ptr, absmax_ptr, nested_ptr, offset, code_ptr, map_ptr, x_ptr + (choice // TOP_K) * (2 * BYTES),
            mask, n, 0, BYTES // BLOCK_BYTES, BYTES, NESTED_BLOCK, 2 * BN, BM, STAGES, UNROLL, ASSEMBLY,
        )  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(both, [BN, 2, BM]), (0, 2, 1)))
        store_act(out_ptr + choice[None, :] * F, column[:, None], gate, up, mask[None, :] & (column < F)[:, None], F)


@triton.jit
def store_act(out_ptr, column, gate, up, mask, F: tl.constexpr):
    """silu(gate) * up times SHRINK, clamped, at its place among even or odd columns."""
    act = tl.minimum(tl.maximum(gate * tl.sigmoid(gate) * up * SHRINK, -LIMIT), LIMIT)
    tl.store(out_ptr + column // 2 + (column % 2) * (F // 2), act.to(tl.float16), mask=mask)


@triton.jit
def vector_product(
    words_ptr, absmax_ptr, nested_ptr, offset, code_ptr, map_ptr, x_ptr, n, first, last,
    BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, WHOLE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """float32 [R]: outputs `n` of one matrix for one row at `x_ptr`, int64 words of four fp16 columns.

    WHOLE: from `first` to `last` are whole rounds of NB, so nothing is masked.
    """
    total = tl.zeros([R, NB, 8], dtype=tl.float32)
    for start in range(first, last, NB):
        block = start + tl.arange(0, NB)
        inside = block < last
        word = block[:, None] * 8 + tl.arange(0, 8)[None, :]
        index = n[:, None] * BLOCKS + block[None, :]
        at = words_ptr + n[:, None, None] * (BLOCKS * 8) + word[None, :, :]
        if WHOLE:
            even = tl.load(x_ptr + word)
            odd = tl.load(x_ptr + BLOCKS * 8 + word)
            packed = tl.load(at)
            absmax = tl.load(absmax_ptr + index).to(tl.int32)
            nested = tl.load(nested_ptr + index // NESTED_BLOCK)
        else:
            even = tl.load(x_ptr + word, mask=inside[:, None], other=0)
            odd = tl.load(x_ptr + BLOCKS * 8 + word, mask=inside[:, None], other=0)
            packed = tl.load(at, mask=inside[None, :, None], other=0)
            absmax = tl.load(absmax_ptr + index, mask=inside[None, :], other=0).to(tl.int32)
            nested = tl.load(nested_ptr + index // NESTED_BLOCK, mask=inside[None, :], other=0.0)
        scale = tl.load(map_ptr + absmax) * nested + offset
        even, _ = tl.broadcast(even[None, :, :], packed)
        odd, _ = tl.broadcast(odd[None, :, :], packed)
        total += dot8(packed, even, odd, code_ptr, ASSEMBLY) * scale[:, :, None]
    return tl.sum(tl.sum(total, 2), 1)


@triton.jit
def vector_gate_up_kernel(
    words_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr, map_ptr, x_ptr, index_ptr, out_ptr,
    TOP_K: tl.constexpr, F: tl.constexpr, BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr,
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
        words_ptr + expert * (2 * F * BLOCKS * 8), absmax_ptr + expert * (2 * F * BLOCKS),
        nested_ptr + expert * ((2 * F * BLOCKS + NESTED_BLOCK - 1) // NESTED_BLOCK), tl.load(offset_ptr + expert),
        code_ptr, map_ptr, x_ptr + (choice // TOP_K) * (BLOCKS * 16), n, 0, BLOCKS,
        BLOCKS, NESTED_BLOCK, 2 * R, NB, (BLOCKS // NB) * NB == BLOCKS, ASSEMBLY,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(both, [R, 2]))
    store_act(out_ptr + choice * F, column, gate, up, column < F, F)


@triton.jit
def vector_down_kernel(
    words_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr, map_ptr, x_ptr, index_ptr, out_ptr, S,
    OUT: tl.constexpr, BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
    NB: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: R outputs of one choice over one split of the columns."""
    wait_for_previous(CHAINED)
    choice, split = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.load(index_ptr + choice)
    share: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    whole: tl.constexpr = (share // NB) * NB * SPLITS == BLOCKS
    y = vector_product(
        words_ptr + expert * (OUT * BLOCKS * 8), absmax_ptr + expert * (OUT * BLOCKS),
        nested_ptr + expert * ((OUT * BLOCKS + NESTED_BLOCK - 1) // NESTED_BLOCK), tl.load(offset_ptr + expert),
        code_ptr, map_ptr, x_ptr + choice * (BLOCKS * 16), tl.minimum(n, OUT - 1),
        split * share, tl.minimum((split + 1) * share, BLOCKS), BLOCKS, NESTED_BLOCK, R, NB, whole, ASSEMBLY,
    )  # fmt: skip
    tl.store(out_ptr + (split * S + choice) * OUT + n, y / SHRINK, mask=n < OUT)


@triton.jit
def vector_dense_kernel(
    words0, words1, words2, absmax0, absmax1, absmax2, nested0, nested1, nested2, offset0, offset1, offset2,
    code_ptr, map_ptr, x_ptr, out_ptr, S,
    END0: tl.constexpr, END1: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, ASSEMBLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: R outputs of one of up to three matrices for one row, over one split of the columns."""
    wait_for_previous(CHAINED)
    first_out, row, split = tl.program_id(0) * R, tl.program_id(1), tl.program_id(2)
    segment = (first_out >= END0).to(tl.int32) + (first_out >= END1).to(tl.int32)
    n = first_out + tl.arange(0, R)
    local = n - tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    share: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    whole: tl.constexpr = (share // NB) * NB * SPLITS == BLOCKS
    y = vector_product(
        pick(segment, words0, words1, words2), pick(segment, absmax0, absmax1, absmax2),
        pick(segment, nested0, nested1, nested2), tl.load(pick(segment, offset0, offset1, offset2)),
        code_ptr, map_ptr, x_ptr + row * (BLOCKS * 16), local, split * share,
        tl.minimum((split + 1) * share, BLOCKS), BLOCKS, NESTED_BLOCK, R, NB, whole, ASSEMBLY,
    )  # fmt: skip
    tl.store(out_ptr + (split * S + row) * OUT + n, y)


# ---- launches ----------------------------------------------------------------------------------------------------

# The best of those tried on an H100 (torch 2.11, triton 3.6) at the shapes of Mixtral 8x7B.
VECTOR_CHOICES, VECTOR_DENSE_ROWS = 4, 2
VECTOR_GATE_UP = {"R": 2, "NB": 8, "num_warps": 1}
VECTOR_DOWN = {"R": 8, "NB": 8, "num_warps": 1}
VECTOR_DENSE = {"R": 4, "NB": 16, "num_warps": 1}
# More threads at once for fewer registers each pays while a tile has 8 rows (240 instead of 244 us at 16 tokens).
MATRIX_GATE_UP = {"BN": 16, "STAGES": 2, "num_warps": 1, "maxnreg": 112}
MATRIX_DOWN = {"BN": 32, "STAGES": 2, "num_warps": 1, "maxnreg": 112}
WIDE_GATE_UP = {"BN": 32, "STAGES": 3, "num_warps": 2}
WIDE_DOWN = {"BN": 32, "STAGES": 2, "num_warps": 1}
MATRIX_DENSE = {"BN": 64, "STAGES": 2, "num_warps": 2}
VECTOR_DOWN_SPLITS, MATRIX_DOWN_SPLITS, MATRIX_DENSE_SPLITS = 7, 4, 8


def down_splits(choices: int, in_: int) -> int:
    """Partial sums of a down product of `in_` columns."""
    return min(VECTOR_DOWN_SPLITS if choices <= VECTOR_CHOICES else MATRIX_DOWN_SPLITS, in_ // 64)


def dense_splits(rows: int, in_: int) -> int:
    """Partial sums of a dense product: one matrix of few rows is too few programs for a GPU."""
    return 1 if rows <= VECTOR_DENSE_ROWS else min(MATRIX_DENSE_SPLITS, in_ // 64)


class Product(NamedTuple):
    """The kernels of one of the experts' two products, with their tiles; the tensor cores have two."""

    vector: Any
    vector_tile: dict[str, int]
    matrix: Any
    matrix_tile: dict[str, int]  # for 8 rows
    wide_tile: dict[str, int]  # for more


class Format(NamedTuple):
    """How experts of one format are multiplied.

    `arguments` gives a kernel's pointers and constants for weights, for the vector units (True) or the tensor cores.
    """

    first: Product
    second: Product
    arguments: Callable[[Any, bool], tuple[tuple[Tensor, ...], dict[str, Any]]]

    def gate_up(
        self, weights: Any, x_TH: Tensor, index_TK: Tensor, order_S: Tensor | None, end_E: Tensor | None,
        out_SF: Tensor,
    ) -> None:  # fmt: skip
        """Writes fp16 `out` [S, F] in the order of the choices, even columns first, times SHRINK.

        Args:
            weights: this format's, E matrices [2F, H].
            index_TK: int64, the choices.
            order_S, end_E: the same sorted by expert, int32 (`rows.sort_by_expert`); without them the choices go one by
                one through the vector units.
        """
        sizes = {"F": out_SF.shape[1], "TOP_K": index_TK.shape[1]}
        self._launch(self.first, weights, (x_TH, index_TK, order_S, end_E, out_SF), out_SF.shape[1], 1, sizes)

    def down(
        self, weights: Any, x_SF: Tensor, index_TK: Tensor, order_S: Tensor | None, end_E: Tensor | None,
        out_PSH: Tensor,
    ) -> None:  # fmt: skip
        """Writes float32 `out` [P, S, H], P splits to be added, in the order of the choices; arguments as `gate_up`."""
        splits, count, out = out_PSH.shape
        sizes = {"OUT": out, "SPLITS": splits}
        self._launch(self.second, weights, (x_SF, index_TK, order_S, end_E, out_PSH, count), out, splits, sizes)

    def _launch(
        self, product: Product, weights: Any, given: tuple[Any, ...], width: int, splits: int, sizes: dict[str, int]
    ) -> None:
        x, index_TK, order_S, end_E, *rest = given
        choices, experts = index_TK.numel(), weights.packed.shape[0]
        pointers, constants = self.arguments(weights, order_S is None)
        if order_S is None:
            tile = product.vector_tile
            grid = (triton.cdiv(width, tile["R"]), choices, splits)
            launch_chained(product.vector, grid, *pointers, x.view(torch.int64), index_TK, *rest,
                           **sizes, **constants, **tile)  # fmt: skip
            return
        block = tile_rows(choices, experts)
        tile = product.matrix_tile if block == 8 else product.wide_tile
        grid = (triton.cdiv(width, tile["BN"]), experts, splits)
        launch_chained(product.matrix, grid, *pointers, x, order_S, end_E, *rest, BM=block,
                       **sizes, **constants, **tile)  # fmt: skip


def _arguments(weights: Nf4Weights, vector: bool) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The weights and the two tables; for the vector units packed as int32 words."""
    device, in_ = weights.packed.device, weights.matrix_shape[1]
    packed = weights.packed.view(torch.int32) if vector else weights.packed
    sizes = {"BLOCKS": in_ // 64} if vector else {"BYTES": in_ // 2, "UNROLL": 4 if in_ % 256 == 0 else 1}
    pointers = packed, *weights[1:], code_of(device), dynamic_map(device)
    return pointers, {"NESTED_BLOCK": NESTED_BLOCK, "ASSEMBLY": ASSEMBLY, **sizes}


NF4 = Format(
    Product(vector_gate_up_kernel, VECTOR_GATE_UP, gate_up_kernel, MATRIX_GATE_UP, WIDE_GATE_UP),
    Product(vector_down_kernel, VECTOR_DOWN, down_kernel, MATRIX_DOWN, WIDE_DOWN),
    _arguments,
)


def dense(matrices: Sequence[Nf4Weights], x_TI: Tensor, out_PTO: Tensor) -> None:
    """Writes float32 `out` [P, T, O], P splits to be added, of one to three matrices' outputs side by side.

    Args:
        matrices: E = 1 each; their outputs are multiples of 16.
        x_TI: fp16, even columns first.
    """
    splits, tokens, out = out_PTO.shape
    widths = [weights.packed.shape[1] for weights in matrices]
    padded = [*matrices, *[matrices[-1]] * (3 - len(matrices))]
    vector = tokens <= VECTOR_DENSE_ROWS
    *fields, codes, maps = zip(*(_arguments(weights, vector)[0] for weights in padded), strict=True)
    pointers = [*(tensor for field in fields for tensor in field), codes[0], maps[0]]
    constants = {"END0": widths[0], "END1": sum(widths[:2]), "OUT": out, "SPLITS": splits}
    constants |= _arguments(matrices[0], vector)[1]
    if vector:
        tile = VECTOR_DENSE
        launch_chained(vector_dense_kernel, (out // tile["R"], tokens, splits), *pointers, x_TI.view(torch.int64),
                       out_PTO, tokens, **constants, **tile)  # fmt: skip
        return
    tile = {**MATRIX_DENSE, "BN": math.gcd(MATRIX_DENSE["BN"], *widths)}
    launch_chained(dense_kernel, (out // tile["BN"], splits), *pointers, x_TI, out_PTO, tokens,
                   BM=tile_rows(tokens, 1), **constants, **tile)  # fmt: skip
