"""NF4 with double quantization, for equally shaped expert matrices: the CPU's codec, and quantizing on any device.

Each expert's matrix is quantized by itself along its contiguous input dimension: blocks of 64 weights share one
scale (absmax), and the scales, less their mean, are quantized to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314,
section 3). That makes an expert's bytes independent of its neighbours, so the same bytes can train, be saved,
offloaded and served, and equal `bitsandbytes.functional.quantize_4bit` of the matrix. Quantizing the fused
[E, out, in] tensor in one go would not: its 8-bit scales differ by 0.28% (relative), since the mean is shared.

Quantizing has one result on every device, whatever the number of threads, where bitsandbytes' own operators differ (a
scale's 8-bit code is the nearest on CUDA, a table's on a CPU; the mean depends on the order of its sum): a merge by
the CPU of what a GPU had trained would have other scales in 0.15% of the blocks. Every step here is an operation of
torch on single elements, which IEEE 754 fixes, and sums have one order. The bytes are those of bitsandbytes on a CPU
(x86, one thread); its search for a weight's level, 30 of 37 ns, is a table here, in pieces that stay in the cache.

Dequantizing is bitsandbytes' own operators; on CUDA with triton it is one kernel (`triton_codes.py`), with the same
bits. `dequantize_reference` is the same in plain torch, as the truth for tests.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from finetune.kernels.operators import HAS_TRITON, operator

if HAS_TRITON:
    from finetune.kernels import triton_codes

_CPU = torch.device("cpu")
BLOCK = 64  # weights per scale
NESTED_BLOCK = 256  # scales per nested scale
# Weights of a piece: on a CPU 1 MiB in float32 a thread, on a GPU what keeps it busy.
_PIECE, _PIECE_CUDA = 2**18, 2**23
# Cells of the table of levels, from -1 to 1, and of bitsandbytes' table of 8-bit codes.
_CELLS, _SCALE_CELLS = 2**12, 2**16 - 1
# Eight powers of two of 128 bfloat16s each; the bits of 2^-110 to 2^120: above and below, a ratio's steps in float32
# may meet subnormal numbers.
_STEPS = 2**10
_SHIFTED = range((127 - 110) << 7, (127 + 120) << 7)
# Sums: numbers that run beside each other (8 of a register, in 4 registers), and at least so many added in a row.
_LANES, _CHAINS, _STEP = 8, 4, 16


class Nf4Weights(NamedTuple):
    """E matrices of shape [out, in] in NF4. `in` is a multiple of 64; N = out * in / 64 scales a matrix.

    packed: uint8 [E, out, in / 2], the even column in the high nibble.
    absmax: uint8 [E, N], indices into bitsandbytes' dynamic map.
    nested_absmax: float32 [E, ceil(N / 256)], the scales of the scales.
    offset: float32 [E], the mean that was taken off the scales.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of one matrix, in weights."""
        _, out, half = self.packed.shape
        return out, 2 * half

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def dequantize_into(self, out: Tensor) -> None:
        """Writes [E, out, in] to `out` (float32, bfloat16 or float16)."""
        _dequantize_nf4(*self, out)


def empty_nf4(experts: int, out: int, in_: int, device: torch.device | str) -> Nf4Weights:
    """Uninitialised weights with the right shapes and dtypes (the meta device serves for placeholders)."""
    assert in_ % BLOCK == 0, f"input dimension {in_} is not a multiple of {BLOCK}"
    scales = out * in_ // BLOCK
    return Nf4Weights(
        torch.empty(experts, out, in_ // 2, dtype=torch.uint8, device=device),
        torch.empty(experts, scales, dtype=torch.uint8, device=device),
        torch.empty(experts, -(-scales // NESTED_BLOCK), dtype=torch.float32, device=device),
        torch.empty(experts, dtype=torch.float32, device=device),
    )


def quantize_nf4(weight_EOI: Tensor) -> Nf4Weights:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) expert by expert; the result lives on the same device."""
    experts, out, in_ = weight_EOI.shape
    weights = empty_nf4(experts, out, in_, weight_EOI.device)
    scales = torch.empty(weights.absmax.shape, dtype=torch.float32, device=weight_EOI.device)
    for matrix, packed, scales_of in zip(weight_EOI, weights.packed, scales, strict=True):
        quantize_codes(matrix, packed.view(-1), scales_of)
    return Nf4Weights(weights.packed, *quantize_scales(scales))


# ---- quantizing ------------------------------------------------------------------------------------------------------


def piece_size(device: torch.device) -> int:
    """How many weights are worked on at once, a multiple of `BLOCK`."""
    return _PIECE_CUDA if device.type == "cuda" else _PIECE * torch.get_num_threads()


def quantize_codes(matrix_OI: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Writes the codes (uint8 [out * in / 2]) and scales (float32 [out * in / 64]) of [out, in] to the tensors given.

    A scale of a block with a NaN is NaN, of one with an infinity infinite; their codes mean nothing.
    """
    size = piece_size(matrix_OI.device)
    pieces = matrix_OI.contiguous().view(-1).split(size)
    by_bits = matrix_OI.dtype == torch.bfloat16 and matrix_OI.device.type == "cpu"
    for piece, into, absmax in zip(pieces, packed.split(size // 2), scales.split(size // BLOCK), strict=True):
        codes = _codes_by_bits(piece, absmax) if by_bits else None
        codes = _codes(piece, absmax) if codes is None else codes
        pairs = codes.view(torch.int16)  # the even column in the low byte, to go to the high nibble
        into.copy_((pairs & 0xF) << 4 | pairs >> 8)


def quantize_scales(absmax_EN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second quantization, of float32 [E, N] scales: uint8 [E, N] indices, float32 [E, ceil(N / 256)] nested
    scales, and the offset [E], which is infinite or NaN where a scale is."""
    experts, count = absmax_EN.shape
    # A divisor on the device: torch multiplies by the reciprocal of a number.
    offset_E = _sum(absmax_EN) / absmax_EN.new_tensor(float(count))
    rest = F.pad(absmax_EN - offset_E.view(-1, 1), (0, -count % NESTED_BLOCK)).view(experts, -1, NESTED_BLOCK)
    nested = rest.abs().amax(2)
    # What float32 has no reciprocal of counts as zero, and so does what is not finite.
    usable = (nested >= torch.finfo(torch.float32).tiny) & nested.isfinite()
    x = rest * torch.where(usable, 1.0 / nested, 0.0).unsqueeze(2)
    cells = x.nan_to_num_(0.0).clamp_(-1, 1).add_(1).mul_(0.5).mul_(_SCALE_CELLS).add_(0.5).to(torch.int32)
    indices = _scale_codes(absmax_EN.device).index_select(0, cells.view(-1)).view(experts, -1, NESTED_BLOCK)
    indices.masked_fill_((nested == 0).unsqueeze(2), 0)
    return indices.view(experts, -1)[:, :count].clone(), nested, offset_E


def _codes(weights: Tensor, scales: Tensor) -> Tensor:
    """uint8, a code for each weight, by the arithmetic of bitsandbytes' CPU operator; fills the scales.

    A weight's code is the number of midpoints between levels that lie below it. With the interval from -1 to 1 cut into
    cells of which none holds two midpoints, that is the number below the cell, and one more if it is above the cell's
    own midpoint. No midpoint is so near to a cell's edge that the rounding of x + 1 could matter.
    """
    below, midpoint_in = _level_table(weights.device)
    blocks = weights.float().view(-1, BLOCK)
    absmax = torch.amax(blocks.abs(), 1, out=scales)
    x = (blocks * (1.0 / absmax.clamp(min=1e-38).view(-1, 1))).nan_to_num_(0.0).clamp_(-1, 1).view(-1)
    cell = (x + 1).mul_(_CELLS / 2).to(torch.int32)
    codes = below.index_select(0, cell)
    codes += x > midpoint_in.index_select(0, cell)
    return codes


def _codes_by_bits(weights: Tensor, scales: Tensor) -> Tensor | None:
    """The same for bfloat16 in a third of the time; None, with the scales filled, for numbers out of its range.

    A weight's code depends on its ratio to its block's absmax. Shifting both by a power of two shifts every step of the
    arithmetic exactly, so that what counts are the absmax's 7 bits of mantissa, the weight's sign, and the difference
    of their bits read as integers; from 8 powers of two on the code is that of zero. A table over these has 2^18 codes,
    of which a block's are 2 KiB.
    """
    bits = weights.view(torch.int16).view(-1, BLOCK)
    magnitudes = bits & 0x7FFF
    top = magnitudes.amax(1)
    scales.copy_(top.view(torch.bfloat16))
    if not (((top >= _SHIFTED.start) & (top < _SHIFTED.stop)) | (top == 0)).all():
        return None
    row = ((top & 0x7F).to(torch.int32) * (2 * _STEPS)).view(-1, 1)
    top.clamp_(min=_SHIFTED.start)  # of a block of zeros, any above zero
    below = torch.sub(top.view(-1, 1), magnitudes, out=magnitudes).clamp_(max=_STEPS - 1)
    below += (bits >> 5).bitwise_and_(_STEPS)
    return _bit_table().index_select(0, (row + below).view(-1))


def _sum(x_EN: Tensor) -> Tensor:
    """float32 [E] sums over N, in the order of torch's sum of a row on one thread of an x86 CPU.

    32 sums of every 32nd number each, kept in four levels: `step` numbers in a row, then `step` of such sums, and so
    on. Then what is left over, and the 32 together.
    """
    experts, count = x_EN.shape
    lanes = _LANES if count >= _LANES else 1
    rows = count // (lanes * _CHAINS)
    step = max(_STEP, 2 ** ((rows - 1).bit_length() // 4))
    left = x_EN[:, : rows * lanes * _CHAINS].reshape(experts, rows, lanes * _CHAINS)
    total = x_EN.new_zeros(experts, lanes * _CHAINS)
    for _ in range(3):
        groups = left.shape[1] // step
        total = total + _in_a_row(left[:, groups * step :])
        left = _in_a_row(left[:, : groups * step].view(experts, groups, step, lanes * _CHAINS).transpose(1, 2))
    total = total + _in_a_row(left)
    first, *others = total.view(experts, _CHAINS, lanes).unbind(1)
    whole = count // lanes * lanes
    vectors = x_EN[:, :whole].reshape(experts, -1, lanes)[:, rows * _CHAINS :]
    for vector in (*vectors.unbind(1), *others):
        first = first + vector
    result = _in_a_row(x_EN[:, whole:])
    for lane in first.unbind(1):
        result = result + lane
    return result


def _in_a_row(x_EN: Tensor) -> Tensor:
    """Sum over the second dimension, one after the other."""
    total = x_EN.new_zeros(x_EN.shape[0], *x_EN.shape[2:])
    for part in x_EN.unbind(1):
        total = total + part
    return total


# ---- tables ----------------------------------------------------------------------------------------------------------


@functools.cache
def code_of(device: torch.device) -> Tensor:
    """float32 [16]: the levels, quantiles of the standard normal (QLoRA, appendix E), in ascending order."""
    return bnb.get_4bit_type("nf4", device=device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """float32 [256]: bitsandbytes' signed dynamic 8-bit code, in which the scales are kept."""
    return bnb.create_dynamic_map().to(device)


@functools.cache
def _scale_codes(device: torch.device) -> Tensor:
    """uint8 [65536]: for every cell from -1 to 1 the code nearest to its middle, as in bitsandbytes' CPU operator."""
    code = dynamic_map(_CPU).double()
    middles = torch.arange(_SCALE_CELLS + 1, dtype=torch.float64) / _SCALE_CELLS * 2 - 1
    return torch.searchsorted((code[1:] + code[:-1]) / 2, middles).to(device, torch.uint8)


@functools.cache
def _level_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every cell, uint8 midpoints below it and float32 the one inside, infinity without."""
    midpoints = _midpoints()
    places = (midpoints.double() + 1) * (_CELLS / 2)
    cells = places.long()
    assert len(cells.unique()) == len(cells), "a cell holds two midpoints"
    assert ((places - places.round()).abs() > 0.01).all(), "a midpoint lies on the edge of a cell"
    below = torch.searchsorted(cells, torch.arange(_CELLS + 1)).to(torch.uint8)
    inside = torch.full((_CELLS + 1,), torch.inf)
    inside[cells] = midpoints
    return below.to(device), inside.to(device)


@functools.cache
def _bit_table() -> Tensor:
    """uint8 [128 mantissas of an absmax, 2 signs, _STEPS below it], flat: the code of the weight."""
    absmax = torch.arange(127 << 7, 128 << 7, dtype=torch.int16).view(-1, 1)
    weights = (absmax - torch.arange(_STEPS, dtype=torch.int16)).view(torch.bfloat16).float()
    x = weights * (1.0 / absmax.view(torch.bfloat16).float())
    return torch.searchsorted(_midpoints(), torch.stack([x, -x], 1).view(-1)).to(torch.uint8)


def _midpoints() -> Tensor:
    levels = code_of(_CPU)
    return (levels[1:] + levels[:-1]) / 2


# ---- dequantizing ----------------------------------------------------------------------------------------------------


def _dequantize_on_gpu(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, out: Tensor) -> None:
    tables = code_of(packed.device), dynamic_map(packed.device)
    triton_codes.dequantize_nf4(packed, absmax, nested_absmax, offset, *tables, NESTED_BLOCK, out)


@operator(launch=HAS_TRITON and _dequantize_on_gpu, writes=["out"])
def _dequantize_nf4(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, out: Tensor) -> None:
    # In pieces that stay in a CPU's cache: whole, one of Mixtral's matrices takes two to four times as long.
    size = piece_size(packed.device)
    for matrix in range(packed.shape[0]):
        scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax[matrix], nested_absmax[matrix], dynamic_map(packed.device), NESTED_BLOCK, torch.float32
        )
        scales += offset[matrix]
        pieces = (out[matrix].view(-1).split(size), packed[matrix].view(-1).split(size // 2))
        for values, codes, scales_of in zip(*pieces, scales.split(size // BLOCK), strict=True):
            decoded = torch.ops.bitsandbytes.dequantize_4bit.default(
                codes, scales_of, BLOCK, "nf4", values.shape, values.dtype
            )
            values.copy_(decoded.view(-1))


def dequantize_reference(weights: Nf4Weights, dtype: torch.dtype) -> Tensor:
    """[E, out, in] in `dtype`, in plain torch: code[nibble] * (map[absmax] * nested_absmax + offset) in float32."""
    experts, (out, in_) = weights.packed.shape[0], weights.matrix_shape
    code = code_of(weights.packed.device)
    nibbles = torch.stack([weights.packed >> 4, weights.packed & 0xF], dim=-1).view(experts, -1, BLOCK)
    scales = dynamic_map(weights.packed.device)[weights.absmax.long()]
    nested = weights.nested_absmax.repeat_interleave(NESTED_BLOCK, dim=1)[:, : scales.shape[1]]
    scales = scales * nested + weights.offset[:, None]
    return (code[nibbles.long()] * scales[..., None]).view(experts, out, in_).to(dtype)


# ---- bitsandbytes' layers --------------------------------------------------------------------------------------------


def nf4_of_linear(layer: Linear4bit) -> Nf4Weights:
    """The layer's own bytes, as packed weights of one matrix [out, in]; nothing is copied."""
    state: Any = layer.weight.quant_state  # type: ignore[attr-defined]  # Params4bit carries it
    assert state.nested, "the layer was quantized without double quantization"
    assert (state.quant_type, state.blocksize, state.state2.blocksize) == ("nf4", BLOCK, NESTED_BLOCK)
    out, in_ = state.shape
    return Nf4Weights(
        layer.weight.detach().view(torch.uint8).view(1, out, in_ // 2),
        state.absmax.view(1, -1),
        state.state2.absmax.view(1, -1),
        state.offset.view(1),
    )


def quantized_parameter(weight_OI: Tensor, layer: Linear4bit) -> Params4bit:
    """The parameter of bitsandbytes' layer with the bytes of `quantize_nf4`, for a weight [out, in]."""
    packed, absmax, nested_absmax, offset = quantize_nf4(weight_OI.unsqueeze(0))
    device = weight_OI.device
    nested = bnb.QuantState(nested_absmax[0], code=dynamic_map(device), blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = bnb.QuantState(
        absmax[0],
        shape=weight_OI.shape,
        code=code_of(device).clone(),  # transformers saves no tensor that two share
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight_OI.dtype,
        offset=offset[0],
        state2=nested,
    )
    layer.quant_state = state
    return Params4bit(
        packed.view(-1, 1), quant_state=state, blocksize=BLOCK, quant_type="nf4", module=layer, bnb_quantized=True
    )


def dequantize_linear(layer: nn.Linear) -> Tensor:
    """float32 [out, in] of a linear layer's weight, whether bitsandbytes 4-bit or plain."""
    weight = layer.weight.detach()
    if not isinstance(layer, Linear4bit):
        return weight.float()
    state = copy.copy(layer.weight.quant_state)  # type: ignore[attr-defined]  # Params4bit carries it
    state.dtype = torch.float32  # else bitsandbytes rounds to the dtype that was quantized
    return bnb.dequantize_4bit(weight, state)
