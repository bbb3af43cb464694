"""The raw Triton kernels on the CPU, by triton's interpreter, against the plain operators.

Not collected by name: `tests/kernels/test_triton_interpreted.py` runs this file in a process of its own, because the
interpreter must be chosen before triton is imported.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from finetune.kernels import (
    decode,
    expert_cache,
    nf4,
    packed_experts,
    rows,
    skinny_gemm,
    triton_codes,
    triton_kernels,
)
from finetune.kernels.nf4 import NESTED_BLOCK, code_of, dequantize_reference, dynamic_map, quantize_nf4
from finetune.kernels.operators import Operator
from finetune.kernels.rows import combine_rows, gather_rows, sort_by_expert, swiglu_backward_, swiglu_forward
from finetune.kernels.skinny_gemm import to_fp16_activations
from tests.kernels.test_operators import arguments

OPERATORS: dict[str, Operator[..., Any]] = {
    value.plain.__name__.lstrip("_"): value
    for module in (decode, expert_cache, nf4, packed_experts, rows, skinny_gemm)
    for value in vars(module).values()
    if isinstance(value, Operator)
}
CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 64), (3, 40, 192), (2, 144, 512)])  # 2 x 144 x 512: several nested blocks
def test_dequantize(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    stack = quantize_nf4(randn(*shape))
    out = torch.empty(shape, dtype=dtype)
    triton_codes.dequantize_nf4(*stack, code_of(CPU), dynamic_map(CPU), NESTED_BLOCK, out)
    expected = dequantize_reference(stack, dtype)
    if (
        dtype == torch.bfloat16
    ):  # the interpreter truncates where the device rounds to nearest: one unit in the last place
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    else:  # float32 arithmetic rounds as torch's: the same bits
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden", [64, 96, 4160])
def test_gather(hidden: int, dtype: torch.dtype) -> None:
    x, token = randn(5, hidden, dtype=dtype), torch.tensor([4, 0, 0, 3, 1, 4, 2])
    out = torch.empty(7, hidden, dtype=dtype)
    triton_kernels.gather_rows(x, token, out)
    assert torch.equal(out, gather_rows(x, token))


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 8), (7, 1, 3), (2500, 2, 8), (260, 8, 128)])
def test_sort(tokens: int, top_k: int, experts: int) -> None:
    index = torch.randint(experts - 1, (tokens, top_k), generator=torch.Generator().manual_seed(3))  # the last is empty
    expected = sort_by_expert(index, experts)
    found = [torch.full_like(tensor, -1) for tensor in expected]
    triton_kernels.sort_rows(index, experts, *found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Brute force: Python's sort is stable.
    order = sorted(range(tokens * top_k), key=index.flatten().tolist().__getitem__)
    assert expected.order_S.tolist() == order
    assert expected.token_S.tolist() == [choice // top_k for choice in order]
    assert expected.position_TK.flatten()[order].tolist() == list(range(tokens * top_k))
    assert expected.end_E.tolist() == [sum(n <= e for n in index.flatten().tolist()) for e in range(experts)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 64), (6, 2, 96), (3, 8, 1100)])
def test_combine(tokens: int, top_k: int, hidden: int, weighted: bool) -> None:
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(tokens)])
    rows = sort_by_expert(index, 8)
    y = randn(tokens * top_k, hidden)
    weight = randn(tokens, top_k, seed=1) if weighted else None
    out = torch.empty(tokens, hidden)
    triton_kernels.combine_rows(y, rows.position_TK, weight, out)
    torch.testing.assert_close(out, combine_rows(y, rows.position_TK, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [64, 192, 2080])
def test_swiglu(width: int) -> None:
    h, v, weight = randn(6, 2 * width), randn(6, width, seed=1), randn(3, 2, seed=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2], dtype=torch.int32)
    act = torch.empty(6, width)
    triton_kernels.swiglu_forward(h, act)
    torch.testing.assert_close(act, swiglu_forward(h), rtol=1e-6, atol=1e-6)

    grad, expected = h.clone(), h.clone()
    grad_weight = torch.empty(3, 2)
    triton_kernels.swiglu_backward(grad, v, weight, order, grad_weight)
    expected_weight = swiglu_backward_(expected, v, weight, order)
    torch.testing.assert_close(grad, expected, rtol=2e-6, atol=2e-6)
    # A sum of `width` products in another order.
    torch.testing.assert_close(grad_weight, expected_weight, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize("name", arguments())
def test_operators_hand_their_arguments_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the dispatcher calls on CUDA, with every operator's arguments, against plain torch on a copy of them."""
    monkeypatch.setattr(skinny_gemm, "runs_on_kernels", lambda x: True)  # decides on the fp16 rows and the splits
    given = arguments()[name]
    if name in ("nf4_skinny_gemm", "skinny_experts"):
        given = (*to_fp16_activations(given[0]), *given[2:])
    ours, plain = copy.deepcopy(given), copy.deepcopy(given)
    found, expected = OPERATORS[name].by_kernel(*ours), OPERATORS[name].plain(*plain)
    pairs = zip(tree_leaves((found, ours)), tree_leaves((expected, plain)), strict=True)
    for a, b in pairs:
        if isinstance(a, torch.Tensor) and a.numel() and a.dtype != torch.float16:
            if name in ("nf4_skinny_gemm", "skinny_experts") and a.dim() == 3:
                a, b = a.sum(0), b.sum(0)  # partial sums, in as many splits as each likes
            assert (a.double() - b.double()).norm() <= 2e-3 * b.double().norm()


def test_no_rows() -> None:
    out = torch.empty(0, 64)
    triton_kernels.gather_rows(randn(4, 64), torch.empty(0, dtype=torch.int64), out)
    triton_kernels.swiglu_forward(torch.empty(0, 128), out)
