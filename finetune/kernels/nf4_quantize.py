"""NF4 quantizing with one result on every device, whatever the number of threads: the bytes of training, again.

bitsandbytes' own operators differ. On CUDA an 8-bit code of a scale is the nearest, on a CPU the one that a table of
65,536 cells holds; the mean that is taken off the scales is a sum whose last bit is of its order, and a GPU, one thread
and two threads each have their own. A merge by the CPU of what a GPU had trained then had other scales in 0.15% of the
blocks. Here every step is an operation of torch on single elements, which IEEE 754 fixes, and sums have one order.

The bytes are those of bitsandbytes on a CPU (x86, one thread). Its search for a weight's level takes 30 of 37 ns there;
here a table finds it, in pieces that stay in the processor's cache. Leaves out decoding, which is exact anyway.
"""

from __future__ import annotations

import functools

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.nf4_code import NF4_CODE

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


def dynamic_map(device: torch.device) -> Tensor:
    """float32 [256]: bitsandbytes' signed dynamic 8-bit code, in which the scales are kept."""
    if device not in _DYNAMIC_MAPS:
        _DYNAMIC_MAPS[device] = bnb.create_dynamic_map().to(device)
    return _DYNAMIC_MAPS[device]


def _scale_codes(device: torch.device) -> Tensor:
    """uint8 [65536]: for every cell from -1 to 1 the code nearest to its middle, as in bitsandbytes' CPU operator."""
    if device not in _SCALE_CODES:
        code = dynamic_map(torch.device("cpu")).double()
        middles = torch.arange(_SCALE_CELLS + 1, dtype=torch.float64) / _SCALE_CELLS * 2 - 1
        _SCALE_CODES[device] = torch.searchsorted((code[1:] + code[:-1]) / 2, middles).to(device, torch.uint8)
    return _SCALE_CODES[device]


def _level_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every cell, uint8 midpoints below it and float32 the one inside, infinity without."""
    if device not in _LEVEL_TABLES:
        levels = torch.tensor(NF4_CODE)
        midpoints = (levels[1:] + levels[:-1]) / 2
        places = (midpoints.double() + 1) * (_CELLS / 2)
        cells = places.long()
        assert len(cells.unique()) == len(cells), "a cell holds two midpoints"
        assert ((places - places.round()).abs() > 0.01).all(), "a midpoint lies on the edge of a cell"
        below = torch.searchsorted(cells, torch.arange(_CELLS + 1)).to(torch.uint8)
        inside = torch.full((_CELLS + 1,), torch.inf)
        inside[cells] = midpoints
        _LEVEL_TABLES[device] = below.to(device), inside.to(device)
    return _LEVEL_TABLES[device]


@functools.cache
def _bit_table() -> Tensor:
    """uint8 [128 mantissas of an absmax, 2 signs, _STEPS below it], flat: the code of the weight."""
    absmax = torch.arange(127 << 7, 128 << 7, dtype=torch.int16).view(-1, 1)
    weights = (absmax - torch.arange(_STEPS, dtype=torch.int16)).view(torch.bfloat16).float()
    x = weights * (1.0 / absmax.view(torch.bfloat16).float())
    levels = torch.tensor(NF4_CODE)
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, torch.stack([x, -x], 1).view(-1)).to(torch.uint8)


_DYNAMIC_MAPS: dict[torch.device, Tensor] = {}
_SCALE_CODES: dict[torch.device, Tensor] = {}
_LEVEL_TABLES: dict[torch.device, tuple[Tensor, Tensor]] = {}
