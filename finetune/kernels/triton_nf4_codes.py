"""How NF4 codes become fp16 in a Triton kernel, and their products with fp16 columns.

By byte permutation (`prmt`): a table of sixteen fp16 values is four registers of low and four of high bytes, so no load
is needed. A byte holds two columns, the even one in its high nibble.

Triton's interpreter knows no assembly: beside each piece stands the same in Triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import struct

import triton
import triton.language as tl

from finetune.kernels.nf4_code import NF4_CODE


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
