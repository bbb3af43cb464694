"""2 and 3 bits: what the solver gains, what the packing holds, and the experts' operators on it.

Truth: the codes as the solver chose them, bits taken apart by hand, float64 products, min-max rounding to nearest.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels import packed_experts
from finetune.kernels.expert_operation import frozen_experts
from finetune.kernels.packed_experts import (
    Bits,
    LowBitWeights,
    dequantize_expert,
    dequantize_experts,
    empty_low_bit,
    pack,
    quantize_low_bit,
    solve,
    unpack,
)
from finetune.kernels.skinny_gemm import skinny_experts, to_fp16_activations

BITS: tuple[Bits, ...] = (2, 3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_code_where_the_docstring_says(bits: Bits) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 64), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5 * 8 * bits)
    assert torch.equal(unpack(packed, 5 * 64), codes)
    # Low bits: byte b of group g holds columns 2b, 32 + 2b, 2b + 1, 33 + 2b, lowest first.
    for group, b in ((0, 0), (2, 7), (4, 15)):
        columns = (2 * b, 32 + 2 * b, 2 * b + 1, 33 + 2 * b)
        by_hand = sum((int(codes[1, group, column]) & 3) << 2 * field for field, column in enumerate(columns))
        assert int(packed[1, 16 * group + b]) == by_hand
    # And so nibble j of a little-endian word belongs to columns j and 32 + j of the 8 that it serves.
    word = int.from_bytes(bytes(packed[0, 4:8].tolist()), "little")
    assert [word >> 4 * j & 3 for j in range(8)] == (codes[0, 0, 8:16] & 3).tolist()
    assert [word >> 4 * j + 2 & 3 for j in range(8)] == (codes[0, 0, 40:48] & 3).tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outliers", [False, True])
def test_the_solver_beats_rounding_to_nearest(bits: Bits, outliers: bool) -> None:
    """Min-max rounding, the start of the paper's solver, which moves the zero alone."""
    weight = torch.randn(300, 64) * 0.02
    if outliers:
        weight[torch.rand_like(weight) < 0.01] *= 8
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    nearest = ((weight - low) / step).round() * step + low
    codes, affine = solve(weight, bits)
    scale, zero = affine.float().split(1, 1)
    solved = (codes - zero) * scale
    for norm in (packed_experts.NORM,) if outliers else (packed_experts.NORM, 1.0, 2.0):
        assert (solved - weight).norm(norm) < (0.85 if bits == 2 else 0.95) * (nearest - weight).norm(norm)
    # Measured: 0.33 and 0.17 of normal weights, where min-max rounding loses 0.45 and 0.19.
    if not outliers:
        assert error(solved, weight) < {2: 0.35, 3: 0.19}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_what_needs_no_solving_is_exact(bits: Bits) -> None:
    """A group on a grid comes back (to fp16's rounding of scale and zero); so do equal weights, and zeros."""
    grid = torch.arange(2**bits).float().repeat(64 // 2**bits) * 0.25 - 0.5
    weight = torch.stack([grid, torch.full((64,), 0.3), torch.zeros(64), torch.full((64,), -1e-7)]).view(1, 4, 64)
    found = dequantize_experts(quantize_low_bit(weight, bits), torch.float32)
    assert torch.allclose(found, weight, atol=2**-18, rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_the_same_weights_give_the_same_bits_in_any_company(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 40, 128)
    whole = quantize_low_bit(weight, bits)
    assert whole.matrix_shape == (40, 128)
    assert whole.bits == bits
    assert whole.nbytes == weight.numel() * bits // 8 + weight.numel() // 64 * 4
    assert [t.shape for t in empty_low_bit(bits, 3, 40, 128, "meta")] == [t.shape for t in whole]
    monkeypatch.setattr(packed_experts, "_CHUNK", 7 * 128)  # seven rows at a time
    for other in (quantize_low_bit(weight, bits), quantize_low_bit(weight, bits)):
        assert all(torch.equal(a, b) for a, b in zip(other, whole, strict=True))
    alone = quantize_low_bit(weight[1:2], bits)
    assert torch.equal(alone.packed[0], whole.packed[1])
    # Times a constant, the codes are the same: nothing in the solver knows the weights' size.
    assert torch.equal(quantize_low_bit(weight * 2**-5, bits).packed, whole.packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_is_scale_times_code_less_zero(bits: Bits, dtype: torch.dtype) -> None:
    stack = quantize_low_bit(torch.randn(2, 6, 192), bits)
    codes = torch.stack([unpack(packed, 192) for packed in stack.packed]).double()
    scale, zero = stack.affine.double().split(1, -1)
    true = ((codes - zero) * scale).view(2, 6, 192)
    assert error(dequantize_experts(stack, dtype), true) < torch.finfo(dtype).eps
    assert torch.equal(dequantize_expert(stack, 1, dtype), dequantize_experts(stack, dtype)[1])


def stacks(bits: Bits) -> tuple[LowBitWeights, LowBitWeights]:
    return quantize_low_bit(torch.randn(4, 128, 192) / 8, bits), quantize_low_bit(torch.randn(4, 192, 64) / 8, bits)


def by_hand(x: Tensor, index: Tensor, gate_up: LowBitWeights, down: LowBitWeights) -> Tensor:
    """[T, K, H] in float64, differentiable."""
    wide, narrow = (dequantize_experts(stack, torch.float32).double() for stack in (gate_up, down))
    gate, up = torch.einsum("th,tkoh->tko", x, wide[index]).chunk(2, -1)
    return torch.einsum("tko,tkho->tkh", F.silu(gate) * up, narrow[index])


@pytest.mark.parametrize("bits", BITS)
def test_few_experts(bits: Bits) -> None:
    gate_up, down = stacks(bits)
    x, index = torch.randn(5, 192), torch.rand(5, 4).topk(2, 1).indices
    found = skinny_experts(to_fp16_activations(x), index, gate_up, down).sum(0)
    assert error(found, by_hand(x.double(), index, gate_up, down).view(10, 192)) < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_frozen_experts_and_their_gradients(bits: Bits) -> None:
    gate_up, down = stacks(bits)
    index = torch.rand(9, 4).topk(2, 1).indices
    x, weight = torch.randn(9, 192, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    grad = torch.randn(9, 192)
    true = (by_hand(exact[0], index, gate_up, down) * exact[1].unsqueeze(-1)).sum(1)
    true.backward(grad.double())
    found = frozen_experts(x, index, weight, gate_up, down)
    found.backward(grad)
    assert error(found, true) < 1e-5
    assert error(x.grad, exact[0].grad) < 1e-5  # type: ignore[arg-type]
    assert error(weight.grad, exact[1].grad) < 1e-5  # type: ignore[arg-type]
