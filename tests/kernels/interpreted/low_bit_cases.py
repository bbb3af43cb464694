"""The kernels of 2 and 3 bits against plain torch: in Triton's interpreter, or on a GPU where there is one.

Tolerances: rows are fp16; vector kernels add products of fp16 in fp16 by eights, matrix kernels round weights to fp16.
"""

from __future__ import annotations

import pytest
import torch

from finetune.kernels import triton_codes, triton_low_bit, triton_skinny_gemm
from finetune.kernels.packed_experts import LowBitWeights, quantize_low_bit
from finetune.kernels.rows import sort_by_expert
from tests.kernels.interpreted.decode_cases import DEVICE, INTERPRETED, halves, near, rand, unsplit
from tests.kernels.interpreted.decode_cases import seeded as seeded


def reference(stack: LowBitWeights, dtype: torch.dtype) -> torch.Tensor:
    """By hand, one field after the other: column 32 r + 2 b + p is field 2 p + r of byte b."""
    (experts, out, groups, _), bits = stack.affine.shape, stack.bits
    low, high = stack.packed.long().split([16 * groups, stack.packed.shape[2] - 16 * groups], -1)
    codes = torch.zeros(experts, out, 64 * groups, dtype=torch.int64, device=low.device)
    for column in range(64):
        r, b, p = column // 32, column % 32 // 2, column % 2
        field = 2 * p + r
        codes[..., column::64] = low[..., b::16] >> 2 * field & 3
        if bits == 3:
            # Of the 16 bits of a word of four bytes: 2, 4, 6, 8 of its first byte, 3, 5, 7, 9 of its second; the
            # same 8 further round for the others.
            place = (8 * (b % 4 // 2) + 2 + b % 2 + 2 * field) % 16
            byte = 2 * (b // 4) + place // 8
            codes[..., column::64] |= (high[..., byte::8] >> place % 8 & 1) << 2
    scale, zero = stack.affine.double().repeat_interleave(64, 2).unbind(-1)
    return ((codes - zero) * scale).to(dtype)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 64), (1, 10, 192)] if INTERPRETED else [(2, 6, 64), (3, 300, 4096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantize(bits: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    stack = quantize_low_bit(rand(*shape), bits)  # type: ignore[arg-type]
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    triton_codes.dequantize_low_bit(*stack, out)
    near(out, reference(stack, torch.float64), 1e-6 if dtype == torch.float32 else 5e-4)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("tokens", [1, 5] if INTERPRETED else [1, 2, 3, 5, 40, 64])
@pytest.mark.parametrize("sizes", [(128, 64)] if INTERPRETED else [(128, 192), (256, 256), (4096, 14336)])
@pytest.mark.parametrize("spread", ["random"] if INTERPRETED else ["random", "one pair"])
def test_experts(bits: int, tokens: int, sizes: tuple[int, int], spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # a program takes a fifth of a second whatever its size: fewer, larger ones
        monkeypatch.setitem(triton_low_bit.VECTOR_GATE_UP, "R", 32)
        monkeypatch.setitem(triton_low_bit.VECTOR_DOWN, "R", 64)
    experts, (hidden, width) = 4, sizes
    gate_up = quantize_low_bit(rand(experts, 2 * width, hidden), bits)  # type: ignore[arg-type]
    down = quantize_low_bit(rand(experts, hidden, width), bits)  # type: ignore[arg-type]
    x = rand(tokens, hidden)
    index = torch.rand(tokens, experts, device=DEVICE).topk(2, 1).indices
    if spread == "one pair":
        index = torch.tensor([[3, 1]], device=DEVICE).repeat(tokens, 1)
    order = end = None
    if index.numel() > triton_skinny_gemm.VECTOR_CHOICES:
        rows = sort_by_expert(index, experts)
        order, end = rows.order_S, rows.end_E
    act = torch.full((2 * tokens, width), float("nan"), dtype=torch.float16, device=DEVICE)
    triton_low_bit.LOW_BIT.gate_up(gate_up, halves(x), index, order, end, act)
    g, d = (reference(stack, torch.float64) for stack in (gate_up, down))
    h = torch.stack([g[e] @ x[t].double() for t, chosen in enumerate(index.tolist()) for e in chosen])
    exact = torch.nn.functional.silu(h[:, :width]) * h[:, width:]
    near(unsplit(act) / triton_skinny_gemm.SHRINK.value, exact, 1.5e-3)
    out = torch.full(
        (triton_skinny_gemm.down_splits(2 * tokens, width), 2 * tokens, hidden), float("nan"), device=DEVICE
    )
    triton_low_bit.LOW_BIT.down(down, act, index, order, end, out)
    near(out.sum(0), torch.stack([d[e] @ row for e, row in zip(index.flatten().tolist(), exact, strict=True)]), 1.5e-3)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_at_the_limit_do_not_overflow(bits: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns at the clamp and all codes at one end: sums of products in fp16 stay finite.

    Weights' roundings to fp16 do not cancel where all are equal, so the tolerance is wider.
    """
    if INTERPRETED:
        monkeypatch.setitem(triton_low_bit.VECTOR_DOWN, "R", 32)
    weight = rand(1, 64, 64).abs().sort(2).values  # so that a group has codes at both ends
    stack = quantize_low_bit(weight, bits)  # type: ignore[arg-type]
    for codes in (0x00, 0xFF):
        ends = LowBitWeights(stack.packed.fill_(codes), stack.affine)
        x = torch.full((tokens, 64), triton_skinny_gemm.LIMIT.value, device=DEVICE).half()
        index = torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
        rows = sort_by_expert(index, 1)
        order, end = (None, None) if tokens <= triton_skinny_gemm.VECTOR_CHOICES else (rows.order_S, rows.end_E)
        out = torch.empty(triton_skinny_gemm.down_splits(tokens, 64), tokens, 64, device=DEVICE)
        triton_low_bit.LOW_BIT.down(ends, x, index, order, end, out)
        exact = x.double() @ reference(ends, torch.float64)[0].T / triton_skinny_gemm.SHRINK.value
        near(out.sum(0), exact, 1e-2)
