"""Packed expert weights: NF4 (`nf4.py`), or 2 or 3 bits by half-quadratic quantization (HQQ), which is here.

Both are NamedTuples of tensors whose first dimension is the expert, the first of them `packed`: what treats them as
bytes (saving, moving, caching single experts) needs to know no more. What multiplies with them asks at the end of this
file.

HQQ: groups of 64 consecutive input weights share a scale s and a zero z in fp16, so that w = s (q - z) with codes q of
2 or 3 bits: 2.5 or 3.5 bits a weight in all, where NF4 takes 4.13. Mixtral 8x7B's experts then take 13.1 or 18.4 GiB.

No data is needed. The solver is that of HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
Learning Models"): minimizing |W - W_q|_p with p < 1, which forgives outliers, is split into a shrinkage of the residual
(an outlier's is taken out of the target) and a closed form for the parameters given the codes. Two differences. The
closed form solves for the scale too, not the zero alone: min-max scales are far too wide for two bits (relative error
of normal weights 0.33 instead of 0.43). And residuals are shrunk in units of the scale, so that a matrix times a
constant has the same codes.

How codes lie: a byte holds the two low bits of columns 2b, 32 + 2b, 2b + 1 and 33 + 2b of its group, lowest first: each
field of a run of bytes is a run of a row whose even columns come first (`skinny_gemm.Fp16Activations`), and each nibble
of a 32-bit word belongs to columns j and 32 + j. Of 3 bits the third ones follow a row's low bits, 16 of them for each
of those words, in the places that `_high_place` says.

Leaves out: grids fitted to data, and attention, whose few weights stay NF4 or 16-bit.

Shape suffixes: E experts, O and I a matrix's output and input, G = I / 64 groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from finetune.kernels.nf4 import Nf4Weights, empty_nf4, quantize_nf4
from finetune.kernels.operators import HAS_TRITON, operator

if HAS_TRITON:
    from finetune.kernels import triton_codes

GROUP = 64  # weights that share a scale and a zero
Bits = Literal[2, 3]
# The solver's: the norm's exponent, the penalty's weight, its growth, and the rounds. The weight is the best of 1.5 to
# 10 for normal weights of 3 bits, and within 1% of it for 2.
NORM, BETA, KAPPA, ROUNDS = 0.7, 3.0, 1.01, 20
# Of the distance between a group's extremes that its levels span at first; the rounds find the rest.
START = 0.9
# Weights that are solved at a time: with its temporaries 0.7 GB.
_CHUNK = 2**24


class LowBitWeights(NamedTuple):
    """E matrices of shape [out, in] in 2 or 3 bits. `in` is a multiple of 64.

    packed: uint8 [E, out, in / 4], or [E, out, in / 4 + in / 8] with the third bits after the low ones.
    affine: float16 [E, out, in / 64, 2], each group's scale and zero.
    """

    packed: Tensor
    affine: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of one matrix, in weights."""
        _, out, groups, _ = self.affine.shape
        return out, GROUP * groups

    @property
    def bits(self) -> int:
        return 8 * self.packed.shape[2] // self.matrix_shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def dequantize_into(self, out: Tensor) -> None:
        """Writes [E, out, in] to `out` (float32, bfloat16 or float16)."""
        _dequantize_low_bit(*self, out)


def empty_low_bit(bits: Bits, experts: int, out: int, in_: int, device: torch.device | str) -> LowBitWeights:
    """Uninitialised weights with the right shapes and dtypes (the meta device serves for placeholders)."""
    assert in_ % GROUP == 0, f"input dimension {in_} is not a multiple of {GROUP}"
    return LowBitWeights(
        torch.empty(experts, out, in_ * bits // 8, dtype=torch.uint8, device=device),
        torch.empty(experts, out, in_ // GROUP, 2, dtype=torch.float16, device=device),
    )


def random_low_bit(
    bits: Bits, shape_EOI: torch.Size, std: float, device: torch.device, generator: torch.Generator
) -> LowBitWeights:
    """Codes drawn evenly, scaled to weights of that standard deviation around zero: to measure speed.

    Solving for Mixtral's 45 billion weights takes an H100 minutes, and would say no more.
    """
    experts, out, in_ = shape_EOI
    weights = empty_low_bit(bits, experts, out, in_, device)
    weights.packed.random_(0, 256, generator=generator)
    weights.affine[..., 0] = std / ((4**bits - 1) / 12) ** 0.5
    weights.affine[..., 1] = (2**bits - 1) / 2
    return weights


# ---- solving ------------------------------------------------------------------------------------------------------


def quantize_low_bit(weight_EOI: Tensor, bits: Bits) -> LowBitWeights:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) in float32; the result lives on the same device."""
    experts, out, in_ = weight_EOI.shape
    weights = empty_low_bit(bits, experts, out, in_, weight_EOI.device)
    rows = max(1, _CHUNK // in_)
    for expert, matrix in enumerate(weight_EOI):
        for first in range(0, matrix.shape[0], rows):
            some = slice(first, first + rows)
            codes, affine = solve(matrix[some].float().unflatten(1, (-1, GROUP)), bits)
            weights.packed[expert, some] = pack(codes, bits)
            weights.affine[expert, some] = affine
    return weights


def solve(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., 64] and float16 [..., 2] of float32 groups [..., 64]; the same for the same weights.

    With residual r = w - s (q - z), in units of s, and e = sign(r) max(0, |r| - |r|^(p-1) / beta) (the paper's
    generalized soft threshold), s and z are the line of least squares through (q, w - s e).
    """
    top, beta = 2**bits - 1, BETA
    low, high = weight.aminmax(dim=-1, keepdim=True)
    # So that the zero of nearly equal weights is a number that fp16 holds.
    least = (torch.maximum(high, -low) * 2.0**-12).clamp_min(2.0**-18)
    scale = torch.maximum((high - low) * (START / top), least)
    zero = top / 2 - (low + high) / 2 / scale
    for _ in range(ROUNDS):
        codes = (weight / scale + zero).round_().clamp_(0, top)
        residual = weight / scale + zero - codes
        size = residual.abs()
        size = (size - size.clamp_min(1e-6).pow_(NORM - 1).div_(beta)).clamp_min_(0)
        target = weight - residual.sign_().mul_(size).mul_(scale)
        mean_code, mean_target = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
        codes -= mean_code
        slope = (codes * target).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        # A group of equal weights has one code and no slope.
        scale = torch.where(slope > least, slope, scale)
        zero = mean_code - mean_target / scale
        beta *= KAPPA
    affine = torch.cat([scale, zero], -1).half()
    scale, zero = affine.float().split(1, -1)
    codes = (weight / scale + zero).round_().clamp_(0, top)
    return codes.to(torch.uint8), affine


# ---- packing ------------------------------------------------------------------------------------------------------


def _high_place(byte: int, field: int) -> int:
    """Where the third bit of a field of a word's byte lies among the word's 16.

    Two bytes' bits are neighbours and a byte's are two apart: shifted by 15, they lie in two fp16 at once.
    """
    return (8 * (byte // 2) + 2 + byte % 2 + 2 * field) % 16


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """uint8 [O, I * bits / 8] of codes uint8 [O, G, 64]."""
    rows, groups, _ = codes.shape
    # Column 32 r + 2 b + p of a group is field 2 p + r of byte b.
    fields = codes.view(rows, groups, 2, 16, 2).permute(0, 1, 3, 4, 2).reshape(rows, groups, 16, 4)
    low = fields & 3
    planes = [(low[..., 0] | low[..., 1] << 2 | low[..., 2] << 4 | low[..., 3] << 6).view(rows, -1)]
    if bits == 3:
        third = (fields >> 2).view(rows, groups * 4, 4, 4).int()
        word = torch.zeros(rows, groups * 4, dtype=torch.int32, device=codes.device)
        for byte in range(4):
            for field in range(4):
                word |= third[:, :, byte, field] << _high_place(byte, field)
        planes.append(torch.stack([word & 0xFF, word >> 8], -1).to(torch.uint8).view(rows, -1))
    return torch.cat(planes, 1)


def unpack(packed: Tensor, in_: int) -> Tensor:
    """Codes uint8 [O, G, 64] of what `pack` made of rows of `in_` columns."""
    rows, groups = packed.shape[0], in_ // GROUP
    low, high = packed.split([in_ // 4, packed.shape[1] - in_ // 4], 1)
    fields = torch.stack([low >> 2 * field & 3 for field in range(4)], -1)
    if high.shape[1]:
        word = high.reshape(rows, -1, 2).int()
        word = word[..., 0] | word[..., 1] << 8
        third = [word >> _high_place(byte, field) & 1 for byte in range(4) for field in range(4)]
        fields |= torch.stack(third, -1).view(fields.shape).to(torch.uint8) << 2
    return fields.view(rows, groups, 16, 2, 2).permute(0, 1, 4, 2, 3).reshape(rows, groups, GROUP)


# ---- dequantizing -------------------------------------------------------------------------------------------------


@operator(launch=HAS_TRITON and triton_codes.dequantize_low_bit, writes=["out"])
def _dequantize_low_bit(packed: Tensor, affine: Tensor, out: Tensor) -> None:
    for matrix in range(packed.shape[0]):
        scale, zero = affine[matrix].float().split(1, -1)
        out[matrix] = ((unpack(packed[matrix], out.shape[2]) - zero) * scale).view(out.shape[1:])


# ---- whatever the format ------------------------------------------------------------------------------------------

PackedExperts = Nf4Weights | LowBitWeights
ExpertStorage = Literal["nf4", "hqq3", "hqq2"]
BITS: dict[ExpertStorage, Bits] = {"hqq3": 3, "hqq2": 2}


def packed_type(storage: ExpertStorage) -> type[Nf4Weights] | type[LowBitWeights]:
    return Nf4Weights if storage == "nf4" else LowBitWeights


def empty_experts(
    storage: ExpertStorage, experts: int, out: int, in_: int, device: torch.device | str
) -> PackedExperts:
    """Uninitialised weights with the right shapes and dtypes (the meta device serves for placeholders)."""
    if storage == "nf4":
        return empty_nf4(experts, out, in_, device)
    return empty_low_bit(BITS[storage], experts, out, in_, device)


def quantize_experts(storage: ExpertStorage, weight_EOI: Tensor) -> PackedExperts:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) expert by expert; the result lives on the same device."""
    return quantize_nf4(weight_EOI) if storage == "nf4" else quantize_low_bit(weight_EOI, BITS[storage])


def packed_from(tensors: Sequence[Tensor]) -> PackedExperts:
    """The weights whose tensors these are; an operator takes them as a list."""
    if len(tensors) == len(Nf4Weights._fields):
        return Nf4Weights(*tensors)
    return LowBitWeights(*tensors)


def dequantize_experts(weights: PackedExperts, dtype: torch.dtype) -> Tensor:
    """[E, out, in] of all matrices in `dtype` (float32, bfloat16 or float16)."""
    out = torch.empty(weights.packed.shape[0], *weights.matrix_shape, dtype=dtype, device=weights.packed.device)
    weights.dequantize_into(out)
    return out


def dequantize_expert(weights: PackedExperts, expert: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """[out, in] of one expert in `dtype` (float32, bfloat16 or float16), written to `out` where it is given."""
    if out is None:
        out = torch.empty(weights.matrix_shape, dtype=dtype, device=weights.packed.device)
    type(weights)(*(tensor[expert : expert + 1] for tensor in weights)).dequantize_into(out.unsqueeze(0))
    return out
