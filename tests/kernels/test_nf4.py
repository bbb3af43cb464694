"""The NF4 codec against bitsandbytes, expert by expert and bit for bit.

Truth: `bitsandbytes.functional.quantize_4bit` and `dequantize_4bit` of each expert's own matrix, which is what any
other program makes of the same weights.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from finetune.kernels.nf4 import (
    Nf4Weights,
    code_of,
    dequantize_linear,
    dequantize_reference,
    dynamic_map,
    empty_nf4,
    quantize_nf4,
    quantize_scales,
)
from finetune.kernels.packed_experts import dequantize_expert

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# [E, out, in] of both projections of three models (hidden, intermediate), by number of scales a matrix: 128 and 64
# are below one nested block of 256, 512 and 256 are whole blocks, 1050 and 525 and 7 leave a rest.
SHAPES = (
    (3, 128, 64),  # gate_up of (64, 64)
    (3, 64, 64),  # down of (64, 64)
    (2, 256, 128),  # gate_up of (128, 128)
    (2, 128, 128),  # down of (128, 128)
    (4, 350, 192),  # 1050 scales
    (4, 175, 192),  # 525 scales
    (1, 7, 64),
)


def random_weights(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal weights, one expert a hundred times larger, so that a mean shared between experts would show."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[-1] *= 100
    return weight.to(dtype)


def by_hand(matrix: Tensor) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_bitsandbytes_of_each_expert(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = random_weights(shape, dtype)
    stack = quantize_nf4(weight)
    assert stack.matrix_shape == shape[1:]
    for expert in range(shape[0]):
        packed, state = by_hand(weight[expert])
        assert torch.equal(stack.packed[expert].flatten(), packed.flatten())
        assert torch.equal(stack.absmax[expert], state.absmax)
        assert torch.equal(stack.nested_absmax[expert], state.state2.absmax)
        assert torch.equal(stack.offset[expert], state.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_at_the_edges_of_levels_equal_bitsandbytes(dtype: torch.dtype) -> None:
    """Weights on and beside the midpoints of levels, blocks of zeros, and the ends."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(640, 4096, generator=generator) * torch.rand(640, 1, generator=generator)
    levels = code_of(torch.device("cpu"))
    midpoints = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))])
    matrix[0] = 0
    matrix[1, :64], matrix[1, 64:128] = torch.cat([edges, torch.ones(19)]), torch.cat([edges, -torch.ones(19)])
    weight = matrix.to(dtype)
    stack = quantize_nf4(weight.unsqueeze(0))
    packed, state = by_hand(weight)
    assert torch.equal(stack.packed.flatten(), packed.flatten())
    assert torch.equal(stack.absmax[0], state.absmax)
    assert torch.equal(stack.offset[0], state.offset)


def test_codes_by_bits_equal_bitsandbytes() -> None:
    """Every ratio of two bfloat16s that the table holds, blocks of zeros, and numbers too small for the table."""
    absmax = torch.arange(127 << 7, 128 << 7, dtype=torch.int16).view(-1, 1)
    below = (absmax - torch.arange(1, 1 + 63 * 17, dtype=torch.int16)).view(torch.bfloat16).view(-1, 63)
    signs = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
    blocks = torch.cat([absmax.view(torch.bfloat16).repeat_interleave(17, 0), below], 1)
    usual = torch.cat([blocks * sign for sign in signs])
    powers = torch.randint(0, 12, (len(usual), 1), generator=torch.Generator().manual_seed(0))
    usual *= (2.0**-powers).to(torch.bfloat16)
    usual[5], usual[6], usual[7, 1:] = 0, -0.0, -0.0
    rare = usual.clone()
    rare[10] *= 2.0**-110  # with subnormal weights
    rare[11] *= 2.0**-120
    for matrix in (usual, rare):
        packed, _ = by_hand(matrix.view(-1, 256))
        wide, _ = by_hand(matrix.view(-1, 256).float())  # whose codes go by arithmetic here
        found = quantize_nf4(matrix.view(1, -1, 256)).packed
        assert torch.equal(found.flatten(), packed.flatten())
        assert torch.equal(found, quantize_nf4(matrix.view(1, -1, 256).float()).packed)
        assert torch.equal(packed, wide)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """Nor on the order in which a device would sum: any number of scales has the sum of one thread."""
    weight = random_weights((2, 1024, 2560), torch.float32)  # 40,960 scales, which torch's sum would share out
    one = quantize_nf4(weight)
    torch.set_num_threads(3)
    three = quantize_nf4(weight)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    for count in (1, 5, 7, 8, 31, 33, 100, 127, 1000, 4095, 33_333, 700_001):
        scales = torch.rand(1, count, generator=torch.Generator().manual_seed(count))
        assert quantize_scales(scales)[2] == scales[0].mean(), count


def test_8_bit_codes_of_scales_equal_bitsandbytes_at_every_edge() -> None:
    """Of its table of 65,536 cells, both ways of every edge; and where all scales are equal."""
    edges = ((torch.arange(65535, dtype=torch.float64) + 0.5) / 65535 * 2 - 1).float()
    around = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))])
    values = torch.cat([around, around.new_zeros(-len(around) % 127)]).view(-1, 127)
    values = torch.cat([values, torch.ones(len(values), 1)], 1).view(-1, 32)
    # Each beside its negative in the order of the sum: their mean is 0, and the edges stay where they are.
    scales = torch.stack([values, -values], 1).view(1, -1)
    code = dynamic_map(torch.device("cpu"))
    indices, nested, offset = quantize_scales(scales)
    expected, absmax = torch.ops.bitsandbytes.quantize_blockwise(scales[0] - offset, code, 256)
    assert offset == 0
    assert torch.equal(nested[0], absmax)
    assert torch.equal(indices[0], expected)
    same = torch.full((1, 300), 0.25)
    assert torch.equal(quantize_scales(same)[0], torch.zeros(1, 300, dtype=torch.uint8))


def test_bits_do_not_depend_on_neighbours_or_strides() -> None:
    """An expert quantized alone, in another order, or from a transposed view has the same bytes."""
    weight = random_weights((3, 128, 64), torch.bfloat16)
    stack = quantize_nf4(weight)
    reverse = quantize_nf4(weight.flip(0))
    strided = quantize_nf4(weight.transpose(1, 2).contiguous().transpose(1, 2))
    for field in Nf4Weights._fields:
        whole = getattr(stack, field)
        assert torch.equal(getattr(reverse, field).flip(0), whole), field
        assert torch.equal(getattr(strided, field), whole), field
        assert torch.equal(getattr(quantize_nf4(weight[1:2]), field)[0], whole[1]), field


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_bitsandbytes_and_plain_torch(
    shape: tuple[int, int, int], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """Also the plain reference to the last bit: bitsandbytes multiplies in float32 and rounds once, to nearest even."""
    weight = random_weights(shape, dtype)
    stack = quantize_nf4(weight)
    reference = dequantize_reference(stack, out_dtype)
    for expert in range(shape[0]):
        packed, state = by_hand(weight[expert])
        state.dtype = out_dtype
        ours = dequantize_expert(stack, expert, out_dtype)
        assert ours.dtype == out_dtype
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))
        assert torch.equal(ours, reference[expert])


def test_code_books_are_those_of_bitsandbytes() -> None:
    _, state = by_hand(random_weights((1, 128, 64), torch.float32)[0])
    assert torch.equal(code_of(torch.device("cpu")), state.code)
    assert torch.equal(dynamic_map(torch.device("cpu")), state.state2.code)


def test_weights_on_the_grid_survive() -> None:
    """Weights on the grid come back as they were, up to the 8-bit scale that they share."""
    block = code_of(torch.device("cpu")).repeat(4)
    stack = quantize_nf4(block.repeat(1, 128, 1))
    back = dequantize_expert(stack, 0, torch.float32)
    assert torch.equal(back[0] / back[0].abs().max(), block)
    assert torch.equal(dequantize_expert(quantize_nf4(torch.zeros(1, 4, 64)), 0, torch.float32), torch.zeros(4, 64))


@pytest.mark.parametrize(("hidden", "intermediate", "experts"), [(4096, 14336, 8), (2048, 768, 128), (2048, 1024, 64)])
def test_bytes_a_weight(hidden: int, intermediate: int, experts: int) -> None:
    """0.5 B of nibbles, 1/64 B of scales, 4/(64 * 256) B of nested scales, and 4 B of offset a matrix: by meta
    tensors of Mixtral 8x7B, Qwen3-30B-A3B and OLMoE-1B-7B, whose matrices are whole nested blocks."""
    for out, in_ in ((2 * intermediate, hidden), (hidden, intermediate)):
        stack = empty_nf4(experts, out, in_, "meta")
        assert stack.nbytes == experts * (out * in_ * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4)


def test_empty_stack_has_the_shapes_and_dtypes_of_a_quantized_one() -> None:
    for shape in SHAPES:
        empty, full = empty_nf4(*shape, device="cpu"), quantize_nf4(random_weights(shape, torch.bfloat16))
        assert [(t.shape, t.dtype) for t in empty] == [(t.shape, t.dtype) for t in full]
        assert empty.nbytes == full.nbytes


def test_rows_that_a_block_would_straddle_are_refused() -> None:
    with pytest.raises(AssertionError, match="96 is not a multiple of 64"):
        empty_nf4(2, 64, 96, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_linear(dtype: torch.dtype) -> None:
    """A 4-bit layer comes back in float32 without the rounding to the dtype that it was quantized from."""
    weight = random_weights((1, 96, 128), dtype)[0]
    layer = Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert torch.equal(dequantize_linear(layer), dequantize_reference(quantize_nf4(weight[None]), torch.float32)[0])
    assert layer.weight.quant_state.dtype == dtype

    plain = nn.Linear(128, 96, bias=False, dtype=dtype)
    assert torch.equal(dequantize_linear(plain), plain.weight.float())
