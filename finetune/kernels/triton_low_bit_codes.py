"""How 2- and 3-bit codes become fp16 in a Triton kernel, and their products with fp16 columns.

No table and no load: a code's bits under the exponent of 1024 are 1024 + 4^f q for field f of a byte, exactly, and one
multiply-add takes the 1024 off again. So the 16 codes of a 32-bit word are two byte permutations, eight logical
operations (sixteen for 3 bits, and five to spread the third ones) and eight of fp16, each for two codes.

`low_bit.py` says how codes lie. Triton's interpreter knows no assembly: beside each piece stands the same in Triton.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import struct

import triton
import triton.language as tl

# (a and b) or c
_AND_OR = "0xEA"


def _pair(value: float) -> str:
    """The fp16 twice, as PTX writes it; the value must be exact."""
    assert struct.unpack("<e", struct.pack("<e", value))[0] == value, value
    (half,) = struct.unpack("<H", struct.pack("<e", value))
    return f"0x{half:04x}{half:04x}"


def _codes_assembly(bits: int, low: str, high: str, unit: float) -> list[str]:
    """PTX for the codes of four bytes `low`, less 2^(bits - 1) and times `unit`: field f's pairs in cf0 and cf1.

    Of 3 bits, `high` names two registers with the third bits of both pairs, field f's at bit 2 + 2 f.
    """
    lines = [f"prmt.b32 a0, {low}, 0, 0x4140;", f"prmt.b32 a1, {low}, 0, 0x4342;"]
    for field in range(4):
        step = 4**field
        for pair in range(2):
            code = f"c{field}{pair}"
            lines.append(f"lop3.b32 {code}, a{pair}, 0x{0x30003 * step:08x}, {_pair(1024)}, {_AND_OR};")
            if bits == 3:
                lines.append(f"lop3.b32 {code}, {high}{pair}, 0x{0x40004 * step:08x}, {code}, {_AND_OR};")
            shift = -unit * (1024 / step + 2 ** (bits - 1))
            lines += [f"mov.b32 m, {_pair(unit / step)};", f"mov.b32 s, {_pair(shift)};"]
            lines.append(f"fma.rn.f16x2 {code}, {code}, m, s;")
    return lines


_CODES = ", ".join(f"c{field}{pair}" for field in range(4) for pair in range(2))


def _dot16_assembly(bits: int) -> str:
    """PTX: float32 sum of a word's 16 codes ($1; its third bits $2), in `UNIT`, times the fp16 columns of its fields.

    $2 or $3 and the next three: the four even columns of the first half of a group, of the second, and the odd ones.
    """
    lines = [f".reg .b32 a0, a1, h0, h1, m, s, {_CODES}, x0, x1, z; .reg .b16 l, u; .reg .f32 f, g;"]
    if bits == 3:
        lines += ["shl.b32 h0, $2, 15;", "or.b32 h0, h0, $2;"]
        lines += ["prmt.b32 a0, $2, 0, 0x4401;", "shl.b32 h1, a0, 15;", "or.b32 h1, h1, a0;"]
    lines += _codes_assembly(bits, "$1", "h", 2.0**-bits)
    lines.append("mov.b32 z, 0;")
    # The fields' order is that of the columns: even first half, even second, odd first, odd second.
    for field in range(4):
        lines.append(f"mov.b64 {{x0, x1}}, ${bits + field};")
        lines += [f"fma.rn.f16x2 z, c{field}0, x0, z;", f"fma.rn.f16x2 z, c{field}1, x1, z;"]
    lines.append("mov.b32 {l, u}, z; cvt.f32.f16 f, l; cvt.f32.f16 g, u; add.f32 $0, f, g;")
    return "{ " + " ".join(lines) + " }"


def _weights_assembly(bits: int) -> str:
    """PTX for fp16 weights of four bytes: field f's in $(2 f) and $(2 f + 1).

    $8: low bits; of 3 bits, $9: third bits, field f's at bit 2 f; then two pairs of scales and two of offsets.
    """
    lines = [f".reg .b32 a0, a1, h0, h1, m, s, {_CODES};"]
    if bits == 3:
        for pair, selector in enumerate(("0x4140", "0x4342")):
            lines += [f"prmt.b32 h{pair}, $9, 0, {selector};", f"shl.b32 h{pair}, h{pair}, 2;"]
    lines += _codes_assembly(bits, "$8", "h", 1.0)
    for field in range(4):
        for pair in range(2):
            scale, offset = f"${7 + bits + pair}", f"${9 + bits + pair}"
            lines.append(f"fma.rn.f16x2 ${2 * field + pair}, c{field}{pair}, {scale}, {offset};")
    return "{ " + " ".join(lines) + " }"


DOT16_2, DOT16_3 = tl.constexpr(_dot16_assembly(2)), tl.constexpr(_dot16_assembly(3))
WEIGHTS_2, WEIGHTS_3 = tl.constexpr(_weights_assembly(2)), tl.constexpr(_weights_assembly(3))
# An eighth of the sum of 16 fp16, so that it stays in fp16.
SUM16 = tl.constexpr(
    f"{{ .reg .b32 m, x0, x1, z; .reg .b16 l, u; .reg .f32 f, g; mov.b32 z, 0; mov.b32 m, {_pair(0.125)}; "
    + " ".join(
        f"mov.b64 {{x0, x1}}, ${field}; fma.rn.f16x2 z, x0, m, z; fma.rn.f16x2 z, x1, m, z;" for field in range(1, 5)
    )
    + " mov.b32 {l, u}, z; cvt.f32.f16 f, l; cvt.f32.f16 g, u; add.f32 $0, f, g; }"
)


@triton.jit
def unpack_affine(affine):
    """float32 scale and zero of their two fp16, as read in one int32."""
    scale = affine.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (affine >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def high_bits(high, byte):
    """The third bits of a word's byte (0 to 3), field f's at bit 2 f, among garbage (see `low_bit._high_place`)."""
    return (high | (high << 16)) >> (8 * (byte // 2) + 2 + byte % 2)


@triton.jit
def column_of(word, j: tl.constexpr):
    """float32: fp16 number `j` of four in an int64."""
    return (word >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def code_of(low, high, byte: tl.constexpr, field: tl.constexpr, BITS: tl.constexpr):
    """int32: the code of one field of a word's byte."""
    code = (low >> (8 * byte + 2 * field)) & 3
    if BITS == 3:
        code |= ((high_bits(high, byte) >> (2 * field)) & 1) << 2
    return code


@triton.jit
def dot16(low, high, even0, even1, odd0, odd1, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """float32: the 16 codes of each word, less 2^(BITS - 1) and times 2^-BITS, times 16 fp16 values."""
    if ASSEMBLY:
        if BITS == 2:
            total = tl.inline_asm_elementwise(
                DOT16_2, "=f,r,l,l,l,l", [low, even0, even1, odd0, odd1], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            total = tl.inline_asm_elementwise(
                DOT16_3, "=f,r,r,l,l,l,l", [low, high, even0, even1, odd0, odd1], dtype=tl.float32, is_pure=True, pack=1
            )
    else:
        total = tl.zeros(low.shape, dtype=tl.float32)
        center: tl.constexpr = 2 ** (BITS - 1)
        for byte in tl.static_range(4):
            total += (code_of(low, high, byte, 0, BITS) - center) * column_of(even0, byte)
            total += (code_of(low, high, byte, 1, BITS) - center) * column_of(even1, byte)
            total += (code_of(low, high, byte, 2, BITS) - center) * column_of(odd0, byte)
            total += (code_of(low, high, byte, 3, BITS) - center) * column_of(odd1, byte)
        total = total / 2**BITS
    return total


@triton.jit
def sum16(even0, even1, odd0, odd1, ASSEMBLY: tl.constexpr):
    """float32: an eighth of the sum of 16 fp16 values."""
    if ASSEMBLY:
        total = tl.inline_asm_elementwise(
            SUM16, "=f,l,l,l,l", [even0, even1, odd0, odd1], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        total = tl.zeros(even0.shape, dtype=tl.float32)
        for j in tl.static_range(4):
            total += column_of(even0, j) + column_of(even1, j) + column_of(odd0, j) + column_of(odd1, j)
        total = total / 8
    return total


@triton.jit
def fp16_weights(low, high, scale, offset, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """fp16 weights scale * (code - 2^(BITS - 1)) + offset, of the shape of `low` (uint8), by field of a byte.

    `high`: uint8, the third bits, field f's at bit 2 f. `scale` and `offset`: fp16.
    """
    scale, _ = tl.broadcast(scale, low)
    offset, _ = tl.broadcast(offset, low)
    if ASSEMBLY:
        if BITS == 2:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                WEIGHTS_2, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [low, scale, offset],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                WEIGHTS_3, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r", [low, high, scale, offset],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        w0 = fp16_weight(low, high, 0, scale, offset, BITS)
        w1 = fp16_weight(low, high, 1, scale, offset, BITS)
        w2 = fp16_weight(low, high, 2, scale, offset, BITS)
        w3 = fp16_weight(low, high, 3, scale, offset, BITS)
    return w0, w1, w2, w3


@triton.jit
def fp16_weight(low, high, field: tl.constexpr, scale, offset, BITS: tl.constexpr):
    """One field's, as `fp16_weights`."""
    code = ((low >> (2 * field)) & 3).to(tl.int32)
    if BITS == 3:
        code |= ((high >> (2 * field)) & 1).to(tl.int32) << 2
    return ((code - 2 ** (BITS - 1)) * scale.to(tl.float32) + offset.to(tl.float32)).to(tl.float16)
