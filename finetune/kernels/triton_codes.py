"""How quantized codes become numbers on a GPU: inside another kernel as fp16, or whole matrices dequantized.

NF4 by byte permutation (`prmt`): a table of sixteen fp16 values is four registers of low and four of high bytes, so no
load is needed. A byte holds two columns, the even one in its high nibble (`nf4.py`).

2 and 3 bits without a table: a code's bits under the exponent of 1024 are 1024 + 4^f q for field f of a byte, exactly,
and one multiply-add takes the 1024 off again. So the 16 codes of a 32-bit word are two byte permutations, eight logical
operations (sixteen for 3 bits, and five to spread the third ones) and eight of fp16, each for two codes.
`packed_experts.py` says how these codes lie.

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

# ---- NF4 ----------------------------------------------------------------------------------------------------------

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
    inner = _decode_assembly(code).strip("{} ")
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


@triton.jit
def dequantize_nf4_kernel(
    words_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr, map_ptr, out_ptr,
    words_per_matrix, scales_per_matrix, nested_per_matrix, NESTED_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
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
NF4_WORDS, NF4_WARPS = 512, 4


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, code: Tensor, dynamic_map: Tensor,
    nested_block: int, out: Tensor,
) -> None:  # fmt: skip
    """Writes `out` [E, ...]: `packed` uint8 [E, bytes], `absmax` [E, N], `nested_absmax` [E, n], `offset` [E]."""
    experts = packed.shape[0]
    words = packed.view(experts, -1).view(torch.int32)
    grid = (triton.cdiv(words.shape[1], NF4_WORDS), experts)
    launch(
        dequantize_nf4_kernel, grid, words, absmax, nested_absmax, offset, code, dynamic_map, out,
        words.shape[1], absmax.shape[1], nested_absmax.shape[1],
        NESTED_BLOCK=nested_block, WORDS=NF4_WORDS, num_warps=NF4_WARPS,
        # Two roundings, as bitsandbytes makes them: a fused multiply-add would change the scale's last bit.
        enable_fp_fusion=False,
    )  # fmt: skip


# ---- 2 and 3 bits ------------------------------------------------------------------------------------------------

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
    """The third bits of a word's byte (0 to 3), field f's at bit 2 f, among garbage (`packed_experts._high_place`)."""
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


@triton.jit
def dequantize_low_bit_kernel(
    words_ptr, thirds_ptr, affine_ptr, out_ptr, words_per_matrix,
    GROUPS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program: WORDS words of 16 weights of one matrix: columns 8 w to 8 w + 7 of a group, and 32 further."""
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words_per_matrix
    row, rest = word // (GROUPS * 4), word % (GROUPS * 4)
    rows = matrix * (words_per_matrix // (GROUPS * 4)) + row
    scale, zero = unpack_affine(tl.load(affine_ptr + rows * GROUPS + rest // 4, mask=inside, other=0))
    # A row of 3 bits is GROUPS * 4 words of low bits and half as many of third bits.
    low = tl.load(words_ptr + rows * (GROUPS * 2 * BITS) + rest, mask=inside, other=0)
    j = tl.arange(0, 8)
    nibble = low[:, None] >> (4 * j)[None, :]
    first, second = nibble & 3, (nibble >> 2) & 3
    if BITS == 3:
        high = (
            tl.load(thirds_ptr + rows * (GROUPS * 12) + GROUPS * 8 + rest, mask=inside, other=0).to(tl.int32) & 0xFFFF
        )
        third = high_bits(high[:, None], (j // 2)[None, :]) >> (4 * (j % 2))[None, :]
        first, second = first | (third & 1) << 2, second | ((third >> 2) & 1) << 2
    column = (rest // 4) * 64 + (rest % 4) * 8
    out = out_ptr + rows[:, None] * (GROUPS * 64) + column[:, None] + j[None, :]
    value = (first.to(tl.float32) - zero[:, None]) * scale[:, None]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    value = (second.to(tl.float32) - zero[:, None]) * scale[:, None]
    tl.store(out + 32, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


LOW_BIT_WORDS, LOW_BIT_WARPS = 256, 4


def dequantize_low_bit(packed: Tensor, affine: Tensor, out: Tensor) -> None:
    """Writes `out` [E, O, I]: `packed` uint8 [E, O, bytes], `affine` fp16 [E, O, G, 2]."""
    (experts, rows, groups, _), bits = affine.shape, packed.shape[2] * 8 // out.shape[2]
    words = rows * groups * 4
    grid = (triton.cdiv(words, LOW_BIT_WORDS), experts)
    launch(
        dequantize_low_bit_kernel, grid, packed.view(torch.int32), packed.view(torch.int16), affine.view(torch.int32),
        out, words, GROUPS=groups, BITS=bits, WORDS=LOW_BIT_WORDS, num_warps=LOW_BIT_WARPS,
    )  # fmt: skip
