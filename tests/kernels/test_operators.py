"""The operators as torch sees them: schemas say what is written, fakes give the shapes and dtypes of the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.kernels import decode, expert_cache, nf4, rows, skinny_gemm  # noqa: F401  # registers the operators
from finetune.kernels.nf4 import quantize_nf4
from finetune.kernels.packed_experts import quantize_low_bit
from finetune.kernels.rows import sort_by_expert
from finetune.kernels.skinny_gemm import fp16_like


def arguments() -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
    x, y, h, v = (torch.randn(n, 64 * m, generator=generator) for n, m in ((5, 1), (10, 1), (10, 4), (10, 2)))
    weight, sorted_rows = torch.rand(5, 2, generator=generator), sort_by_expert(index, 4)
    stack = quantize_nf4(torch.randn(3, 64, 128, generator=generator))
    half = fp16_like(x)
    gate_up = quantize_nf4(torch.randn(4, 128, 64, generator=generator))
    down = quantize_nf4(torch.randn(4, 64, 64, generator=generator))
    matrix = quantize_nf4(torch.randn(1, 32, 64, generator=generator))
    which = torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32)
    position = torch.arange(5, dtype=torch.int32)
    pages, pool = torch.arange(1, 6, dtype=torch.int32)[:, None], torch.randn(6, 8, 1, 16, generator=generator)
    qkv, table = torch.randn(1, 5, 64, generator=generator), torch.rand(8, 8, generator=generator).repeat(1, 2)
    return {
        "add_norm": (x, torch.randn(2, 10, 64, generator=generator), weight, torch.ones(64), 1e-5),
        "route": (x, torch.randn(2, 4, 64, generator=generator), which, 2, True),
        "lora_rows": (
            torch.randn(2, 5, 32, generator=generator),
            x,
            torch.randn(1, 4, 64, generator=generator),
            torch.randn(1, 32, 4, generator=generator),
            torch.ones(1, 32),
            torch.zeros(32, dtype=torch.int32),
            which,
        ),
        "assign_slots": (
            index,
            torch.tensor([0, 2, -1], dtype=torch.int32),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            torch.tensor([0, 1, 0, 0], dtype=torch.int32),
            1,
            2,
        ),
        "fetch_experts": (torch.tensor([-1, 0, 2], dtype=torch.int32), list(stack), [t.clone() for t in stack]),
        "nf4_skinny_gemm": (x, half, list(matrix)),
        "skinny_experts": (x, half, index, list(gate_up), list(down)),
        "rope_write": (qkv, table, table, position, pages, pool, pool.clone(), 2),
        "paged_attention": (torch.randn(5, 2, 16, generator=generator), pool, pool, pages, position, 0.25, 2**30),
        "dequantize_nf4": (*stack, torch.empty(3, 64, 128)),
        "dequantize_low_bit": (*quantize_low_bit(torch.randn(2, 8, 64, generator=generator), 3), torch.empty(2, 8, 64)),
        "sort_by_expert": (index, 4),
        "gather_rows": (x, sorted_rows.token_S),
        "combine_rows": (y, sorted_rows.position_TK, weight),
        "swiglu_forward": (h,),
        "swiglu_backward_": (h, v, weight, sorted_rows.order_S),
    }


def test_few_experts_of_two_bits() -> None:
    """The same operator, told by the number of tensors that a stack has."""
    x, half, index, *_ = arguments()["skinny_experts"]
    gate_up = quantize_low_bit(torch.randn(4, 128, 64), 2)
    down = quantize_low_bit(torch.randn(4, 64, 64), 2)
    operator = torch.ops.moe_qlora.skinny_experts.default
    given = (x, half, index, list(gate_up), list(down))
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", arguments())
def test_schema_and_fake(name: str) -> None:
    operator = getattr(torch.ops.moe_qlora, name).default
    torch.library.opcheck(operator, arguments()[name], test_utils=("test_schema", "test_faketensor"))


def test_all_are_tested() -> None:
    assert {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "moe_qlora" in name} == set(
        arguments()
    )
