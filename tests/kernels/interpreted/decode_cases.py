"""The kernels of a decoding step against plain torch: in Triton's interpreter, or on a GPU where there is one.

Tolerances: the kernels' rows are fp16 and their sums float32, plain torch's are the dtype's own. Measured largest
relative differences (norms, bfloat16): products 3e-3, attention 4e-3, the rest at most one rounding of the dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import decode, skinny_gemm, triton_decode, triton_skinny_gemm
from finetune.kernels.nf4 import dequantize_reference, quantize_nf4
from finetune.kernels.rows import sort_by_expert
from finetune.kernels.skinny_gemm import to_fp16_activations

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# The interpreter cuts bfloat16 off where a GPU rounds, and needs seconds for what a GPU does at once.
INTERPRETED = DEVICE.type == "cpu"
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def halves(x: Tensor) -> Tensor:
    return torch.cat([x[:, 0::2], x[:, 1::2]], 1).half().contiguous()


def unsplit(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, 0::2], out[:, 1::2] = x.chunk(2, 1)
    return out


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, error


@pytest.mark.parametrize("tokens", [1, 3] if INTERPRETED else [1, 2, 3, 20, 64])
@pytest.mark.parametrize("hidden", [64, 256])
def test_dense(tokens: int, hidden: int) -> None:
    widths = (32, 16, 16) if INTERPRETED else (96, 64, 32)
    stacks = [quantize_nf4(rand(1, width, hidden)) for width in widths]
    x = rand(tokens, hidden)
    for some in (stacks, stacks[:1], stacks[:2]):
        out = torch.full(
            (triton_skinny_gemm.dense_splits(tokens, hidden), tokens, sum(stack.packed.shape[1] for stack in some)),
            float("nan"),
            device=DEVICE,
        )
        triton_skinny_gemm.dense(some, halves(x), out)
        exact = [x.double() @ dequantize_reference(stack, torch.float32)[0].double().T for stack in some]
        near(out.sum(0), torch.cat(exact, 1), 1e-3)


@pytest.mark.parametrize("tokens", [1, 5] if INTERPRETED else [1, 2, 3, 5, 40, 64])
@pytest.mark.parametrize("sizes", [(64, 64)] if INTERPRETED else [(128, 192), (256, 256), (4096, 14336)])
@pytest.mark.parametrize("spread", ["random"] if INTERPRETED else ["random", "one pair"])
def test_experts(tokens: int, sizes: tuple[int, int], spread: str) -> None:
    experts, (hidden, width) = 4, sizes
    gate_up, down = quantize_nf4(rand(experts, 2 * width, hidden)), quantize_nf4(rand(experts, hidden, width))
    x = rand(tokens, hidden)
    index = torch.rand(tokens, experts, device=DEVICE).topk(2, 1).indices
    if spread == "one pair":
        index = torch.tensor([[3, 1]], device=DEVICE).repeat(tokens, 1)
    order = end = None
    if index.numel() > triton_skinny_gemm.VECTOR_CHOICES:
        rows = sort_by_expert(index, experts)
        order, end = rows.order_S, rows.end_E
    act = torch.full((2 * tokens, width), float("nan"), dtype=torch.float16, device=DEVICE)
    triton_skinny_gemm.NF4.gate_up(gate_up, halves(x), index, order, end, act)
    g, d = (dequantize_reference(stack, torch.float32).double() for stack in (gate_up, down))
    h = torch.stack([g[e] @ x[t].double() for t, chosen in enumerate(index.tolist()) for e in chosen])
    exact = torch.nn.functional.silu(h[:, :width]) * h[:, width:]
    near(unsplit(act) / triton_skinny_gemm.SHRINK.value, exact, 1e-3)
    out = torch.full(
        (triton_skinny_gemm.down_splits(2 * tokens, width), 2 * tokens, hidden), float("nan"), device=DEVICE
    )
    triton_skinny_gemm.NF4.down(down, act, index, order, end, out)
    near(out.sum(0), torch.stack([d[e] @ row for e, row in zip(index.flatten().tolist(), exact, strict=True)]), 1e-3)


@pytest.mark.parametrize("hidden", [96, 128])
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_add_norm(hidden: int, parts: int, weighted: bool) -> None:
    residual, norm = rand(5, hidden), rand(hidden)
    delta = rand(parts, 10 if weighted else 5, hidden, dtype=torch.float32)
    weight = torch.rand(5, 2, device=DEVICE) if weighted else None
    found = torch.empty_like(residual), torch.empty_like(residual), residual.new_empty(5, hidden, dtype=torch.float16)
    triton_decode.add_norm(residual, delta, weight, norm, 1e-5, *found)
    expected = decode._add_norm.plain(residual, delta, weight, norm, 1e-5)
    near(found[0], expected[0], 2e-3)
    near(found[1], expected[1], 4e-3)
    assert torch.equal(unsplit(found[2]), found[1].half())


@pytest.mark.parametrize("experts", [4, 6, 16])
@pytest.mark.parametrize("normalize", [False, True])
def test_route(experts: int, normalize: bool) -> None:
    x, gates = rand(7, 96), rand(3, experts, 96) / 10
    which = torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    index = torch.empty(7, 2, dtype=torch.int64, device=DEVICE)
    weight = torch.empty(7, 2, device=DEVICE)
    triton_decode.route(x, gates, which, 2, normalize, index, weight)
    expected_index, expected_weight = decode.route.plain(x, gates, which, 2, normalize)
    assert torch.equal(index, expected_index)
    near(weight, expected_weight, 1e-2)


@pytest.mark.parametrize("experts", [4, 6])
@pytest.mark.parametrize("normalize", [False, True])
def test_route_of_what_is_not_finite(experts: int, normalize: bool) -> None:
    """Experts that exist, each once, and NaN weights as in torch; the other rows as if they were alone."""
    x, gates = rand(5, 96), rand(2, experts, 96) / 10
    x[1, 5], x[3, 0] = float("nan"), float("inf")
    gates[1, experts - 1] = float("nan")
    which = torch.tensor([0, 0, 1, 0, 0], dtype=torch.int32, device=DEVICE)
    index, weight = torch.full((5, 2), -1, device=DEVICE), torch.zeros(5, 2, device=DEVICE)
    triton_decode.route(x, gates, which, 2, normalize, index, weight)
    assert ((index >= 0) & (index < experts)).all()
    assert (index[:, 0] != index[:, 1]).all()
    expected_index, expected_weight = decode.route.plain(x, gates, which, 2, normalize)
    assert ((expected_index >= 0) & (expected_index < experts)).all()
    assert torch.equal(weight.isnan(), expected_weight.isnan())
    assert weight.isnan().all(1).tolist() == [False, True, True, True, False]
    assert torch.equal(index[[0, 4]], expected_index[[0, 4]])
    near(weight[[0, 4]], expected_weight[[0, 4]], 1e-2)


@pytest.mark.parametrize("parts", [1, 4])
def test_lora(parts: int) -> None:
    x, y = rand(6, 128), rand(parts, 6, 96, dtype=torch.float32)
    a, b = rand(2, 3 * 5, 128, dtype=torch.float32), rand(2, 96, 5, dtype=torch.float32)
    magnitude = torch.rand(2, 96, device=DEVICE) + 0.5
    segment = torch.tensor([0] * 48 + [1] * 32 + [2] * 16, dtype=torch.int32, device=DEVICE)
    which = torch.tensor([0, 1, 2, 2, 0, 1], dtype=torch.int32, device=DEVICE)
    found, expected = y.clone(), y.clone()
    triton_decode.lora_rows(found, x, a, b, magnitude, segment, which)
    decode.lora_rows.plain(expected, x, a, b, magnitude, segment, which)
    near(found.sum(0), expected.sum(0), 1e-5)
    assert torch.equal(found[:, which == 0], y[:, which == 0])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("shape", [(4, 2, 32)] if INTERPRETED else [(4, 2, 32), (6, 2, 16), (8, 1, 48), (32, 8, 128)])
def test_attention_over_pages(window: int | None, shape: tuple[int, int, int]) -> None:
    heads, groups, dim = shape
    page, rows = 64, 5
    k, v = rand(20, page, groups, dim), rand(20, page, groups, dim)
    pages = (torch.randperm(19)[: rows * 3] + 1).view(rows, 3).int().to(DEVICE)
    position = torch.tensor([0, 63, 64, 150, 191], dtype=torch.int32, device=DEVICE)
    qkv = rand(2, rows, (heads + 2 * groups) * dim, dtype=torch.float32)
    angle = torch.rand(192, dim // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    found_k, found_v, expected_k, expected_v = k.clone(), v.clone(), k.clone(), v.clone()
    q = torch.empty(rows, heads, dim, dtype=DTYPE, device=DEVICE)
    triton_decode.rope_write(qkv, cos, sin, position, pages, found_k, found_v, heads, q)
    expected_q = decode.rope_write.plain(qkv, cos, sin, position, pages, expected_k, expected_v, heads)
    near(q, expected_q, 4e-3)
    near(found_k, expected_k, 4e-3)
    assert torch.equal(found_v, expected_v)
    out = torch.empty(rows, heads * dim, dtype=DTYPE, device=DEVICE)
    half = torch.empty(rows, heads * dim, dtype=torch.float16, device=DEVICE)
    limit = decode.NO_WINDOW if window is None else window
    triton_decode.paged_attention(q, found_k, found_v, pages, position, dim**-0.5, limit, out, half)
    near(out, decode._paged_attention.plain(q, found_k, found_v, pages, position, dim**-0.5, limit)[0], 8e-3)
    assert torch.equal(unsplit(half), out.half())


def test_rows_prepared_by_hand_are_what_kernels_prepare() -> None:
    x = rand(3, 64)
    rows = to_fp16_activations(x)
    if skinny_gemm.runs_on_kernels(x):
        assert torch.equal(unsplit(rows.half), x.half())
    else:
        assert rows.half.numel() == 0
