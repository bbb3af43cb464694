"""The GPU's NF4 codec: whole matrices dequantized, and codes that become fp16 inside another Triton kernel.

Inside a kernel by byte permutation (`prmt`): a table of sixteen fp16 values is four registers of low and four of high
bytes, so no load is needed. A byte holds two columns, the even one in its high nibble. `nf4.py` says how the bytes lie.

Triton's interpreter knows no assembly: beside each piece stands the same in Triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import struct

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import launch

NF4_CODE = tuple(bnb.get_4bit_type("nf4", device="cpu").tolist())


def _decode_assembly(code: tuple[float, ...]) -> str:
    """PTX for four packed bytes: two fp16 pairs of the low nibbles ($0, $1), two of the high ones ($2, $3).

    `prmt` picks four bytes of eight by four selectors of three bits; a nibble's highest bit then picks between the
    result for codes 0 to 7 and that for 8 to 15.
    """
    halves = [struct.unpack("<H", struct.pack("<e", value))[0] for value in code]
    low, high = ([half >> shift & 0xFF for half in halves] for shift in (0, 8))

    def register(values: list[int], quarter: int) -> str:
        a, b, c, d = values[4 * quarter : 4 * quarter + 4]
        return f"0x{a | b << 8 | c << 16 | d << 24:08x}"

    lines = [".reg .b32 s, t, s1, t1, a, b, lo, hi;"]
    lines += ["and.b32 s, $4, 0x77777777;", "shr.u32 t, $4, 1;", "lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;"]
    lines += ["shr.u32 s1, s, 16;", "shr.u32 t1, t, 16;"]
    for half, (select, choose) in enumerate((("s", "t"), ("s1", "t1"))):
        for name, values in (("lo", low), ("hi", high)):
            lines.append(f"prmt.b32 a, {register(values, 0)}, {register(values, 1)}, {select};")
            lines.append(f"prmt.b32 b, {register(values, 2)}, {register(values, 3)}, {select};")
            lines.append(f"prmt.b32 {name}, a, b, {choose};")
        lines += [f"prmt.b32 ${half}, lo, hi, 0x6240;", f"prmt.b32 ${half + 2}, lo, hi, 0x7351;"]
    return "{ " + " ".join(lines) + " }"


DECODE = tl.constexpr(_decode_assembly(NF4_CODE))


@triton.jit
def decode(packed, code_ptr, ASSEMBLY: tl.constexpr):
    """fp16 codes of the odd and of the even columns, each of `packed`'s shape (uint8)."""
    if ASSEMBLY:
        odd, even = tl.inline_asm_elementwise(
            DECODE, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        odd = tl.load(code_ptr + (packed & 0xF).to(tl.int32)).to(tl.float16)
        even = tl.load(code_ptr + (packed >> 4).to(tl.int32)).to(tl.float16)
    return odd, even


def _dot8_assembly(code: tuple[float, ...]) -> str:
    """PTX: float32 sum of eight codes ($1, packed) times eight fp16 values ($2 even columns, $3 odd ones)."""
    body = _decode_assembly(code)
    inner = body.strip("{} ")
    for index, name in enumerate(("p0", "p1", "q0", "q1")):
        inner = inner.replace(f"prmt.b32 ${index},", f"prmt.b32 {name},")
    inner = inner.replace("$4", "$1")
    return (
        "{ .reg .b32 p0, p1, q0, q1, x0, x1, x2, x3, z; .reg .b16 l, u; .reg .f32 f, g; "
        + inner
        + " mov.b64 {x0, x1}, $3; mov.b64 {x2, x3}, $2;"
        " mul.rn.f16x2 z, p0, x0; fma.rn.f16x2 z, q0, x2, z; fma.rn.f16x2 z, p1, x1, z; fma.rn.f16x2 z, q1, x3, z;"
        " mov.b32 {l, u}, z; cvt.f32.f16 f, l; cvt.f32.f16 g, u; add.f32 $0, f, g; }"
    )


DOT8 = tl.constexpr(_dot8_assembly(NF4_CODE))


@triton.jit
def dot8(word, even64, odd64, code_ptr, ASSEMBLY: tl.constexpr):
    """float32: the eight weights of each word, without their scale, times eight fp16 values."""
    if ASSEMBLY:
        total = tl.inline_asm_elementwise(
            DOT8, "=f,r,l,l", [word, even64, odd64], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        total = tl.zeros(word.shape, dtype=tl.float32)
        for j in tl.static_range(4):
            low = tl.load(code_ptr + ((word >> (8 * j)) & 0xF))
            high = tl.load(code_ptr + ((word >> (8 * j + 4)) & 0xF))
            total += high * (even64 >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            total += low * (odd64 >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return total


# ---- whole matrices --------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_nf4_kernel(
    words_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    code_ptr,
    map_ptr,
    out_ptr,
    words_per_matrix,
    scales_per_matrix,
    nested_per_matrix,
    NESTED_BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program: WORDS words of 8 weights (4 packed bytes) of one matrix; a scale serves 8 words, 64 weights."""
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words_per_matrix
    scale_index = word // 8
    absmax = tl.load(absmax_ptr + matrix * scales_per_matrix + scale_index, mask=inside, other=0)
    nested = tl.load(nested_ptr + matrix * nested_per_matrix + scale_index // NESTED_BLOCK, mask=inside, other=0.0)
    scale = tl.load(map_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr + matrix)
    packed = tl.load(words_ptr + matrix * words_per_matrix + word, mask=inside, other=0)
    # Little-endian bytes, the even column in the high nibble: weight j sits at bit 8 * (j // 2) + 4 * (1 - j % 2).
    j = tl.arange(0, 8)
    nibble = (packed[:, None] >> ((j // 2) * 8 + (1 - j % 2) * 4)[None, :]) & 0xF
    value = tl.load(code_ptr + nibble) * scale[:, None]
    out = out_ptr + (matrix * words_per_matrix + word[:, None]) * 8 + j[None, :]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


# The best of those tried on an H100 (torch 2.11, triton 3.6) at the shapes of Mixtral 8x7B: 97% of the copy rate.
DEQUANTIZE_WORDS, DEQUANTIZE_WARPS = 512, 4


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, code: Tensor, dynamic_map: Tensor,
    nested_block: int, out: Tensor,
) -> None:  # fmt: skip
    """Writes `out` [E, ...]: `packed` uint8 [E, bytes], `absmax` [E, N], `nested_absmax` [E, n], `offset` [E]."""
    experts = packed.shape[0]
    words = packed.view(experts, -1).view(torch.int32)
    grid = (triton.cdiv(words.shape[1], DEQUANTIZE_WORDS), experts)
    launch(
        dequantize_nf4_kernel, grid, words, absmax, nested_absmax, offset, code, dynamic_map, out,
        words.shape[1], absmax.shape[1], nested_absmax.shape[1],
        NESTED_BLOCK=nested_block, WORDS=DEQUANTIZE_WORDS, num_warps=DEQUANTIZE_WARPS,
        # Two roundings, as bitsandbytes makes them: a fused multiply-add would change the scale's last bit.
        enable_fp_fusion=False,
    )  # fmt: skip
