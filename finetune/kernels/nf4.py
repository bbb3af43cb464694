"""NF4 with double quantization, for a stack of equally shaped expert matrices.

Each expert's matrix is quantized by itself along its contiguous input dimension: blocks of 64 weights share one
scale (absmax), and the scales, less their mean, are quantized to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314,
section 3). That makes an expert's bytes independent of its neighbours, so the same bytes can train, be saved,
offloaded and served, and equal `bitsandbytes.functional.quantize_4bit` of the matrix. Quantizing the fused
[E, out, in] tensor in one go would not: its 8-bit scales differ by 0.28% (relative), since the mean is shared.

Quantizing is nf4_quantize.py's, with the same bytes on every device. Dequantizing is bitsandbytes' own operators; on
CUDA with triton one kernel that decodes the scales too (bitsandbytes makes three passes), with the same bits.
`dequantize_reference` is the same in plain torch, as the truth for tests.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from finetune.kernels.nf4_code import NF4_CODE
from finetune.kernels.nf4_quantize import BLOCK, NESTED_BLOCK, dynamic_map, piece_size, quantize_codes, quantize_scales
from finetune.kernels.operators import HAS_TRITON, define

if HAS_TRITON:
    from finetune.kernels import triton_kernels


class Nf4Stack(NamedTuple):
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
        _dequantize(*self, out)


def empty_stack(experts: int, out: int, in_: int, device: torch.device | str) -> Nf4Stack:
    """An uninitialised stack with the right shapes and dtypes (the meta device serves for placeholders)."""
    assert in_ % BLOCK == 0, f"input dimension {in_} is not a multiple of {BLOCK}"
    scales = out * in_ // BLOCK
    return Nf4Stack(
        torch.empty(experts, out, in_ // 2, dtype=torch.uint8, device=device),
        torch.empty(experts, scales, dtype=torch.uint8, device=device),
        torch.empty(experts, -(-scales // NESTED_BLOCK), dtype=torch.float32, device=device),
        torch.empty(experts, dtype=torch.float32, device=device),
    )


def quantize_stack(weight_EOI: Tensor) -> Nf4Stack:
    """Quantizes [E, out, in] (float32, bfloat16 or float16) expert by expert; the result lives on the same device."""
    experts, out, in_ = weight_EOI.shape
    stack = empty_stack(experts, out, in_, weight_EOI.device)
    scales = torch.empty(stack.absmax.shape, dtype=torch.float32, device=weight_EOI.device)
    for matrix, packed, scales_of in zip(weight_EOI, stack.packed, scales, strict=True):
        quantize_codes(matrix, packed.view(-1), scales_of)
    return Nf4Stack(stack.packed, *quantize_scales(scales))


def code_of(device: torch.device) -> Tensor:
    """float32 [16]: the NF4 code."""
    if device not in _CODES:
        _CODES[device] = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    return _CODES[device]


_CODES: dict[torch.device, Tensor] = {}


def _dequantize_plain(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, out: Tensor) -> None:
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


def _dequantize_cuda(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, out: Tensor) -> None:
    tables = code_of(packed.device), dynamic_map(packed.device)
    triton_kernels.dequantize_nf4(packed, absmax, nested_absmax, offset, *tables, NESTED_BLOCK, out)


_dequantize = define(
    "dequantize_nf4(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset, Tensor(a!) out) -> ()",
    plain=_dequantize_plain,
    cuda=_dequantize_cuda if HAS_TRITON else None,
    fake=lambda packed, absmax, nested_absmax, offset, out: None,
)


def stack_of_linear(layer: Linear4bit) -> Nf4Stack:
    """The layer's own bytes, as a stack of one matrix [out, in]; nothing is copied."""
    state: Any = layer.weight.quant_state  # type: ignore[attr-defined]  # Params4bit carries it
    assert state.nested, "the layer was quantized without double quantization"
    assert (state.quant_type, state.blocksize, state.state2.blocksize) == ("nf4", BLOCK, NESTED_BLOCK)
    out, in_ = state.shape
    return Nf4Stack(
        layer.weight.detach().view(torch.uint8).view(1, out, in_ // 2),
        state.absmax.view(1, -1),
        state.state2.absmax.view(1, -1),
        state.offset.view(1),
    )


def quantized_parameter(weight_OI: Tensor, layer: Linear4bit) -> Params4bit:
    """The parameter of bitsandbytes' layer with the bytes of `quantize_stack`, for a weight [out, in]."""
    packed, absmax, nested_absmax, offset = quantize_stack(weight_OI.unsqueeze(0))
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


def dequantize_reference(stack: Nf4Stack, dtype: torch.dtype) -> Tensor:
    """[E, out, in] in `dtype`, in plain torch: code[nibble] * (map[absmax] * nested_absmax + offset) in float32."""
    experts, (out, in_) = stack.packed.shape[0], stack.matrix_shape
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=stack.packed.device)
    nibbles = torch.stack([stack.packed >> 4, stack.packed & 0xF], dim=-1).view(experts, -1, BLOCK)
    scales = dynamic_map(stack.packed.device)[stack.absmax.long()]
    nested = stack.nested_absmax.repeat_interleave(NESTED_BLOCK, dim=1)[:, : scales.shape[1]]
    scales = scales * nested + stack.offset[:, None]
    return (code[nibbles.long()] * scales[..., None]).view(experts, out, in_).to(dtype)
