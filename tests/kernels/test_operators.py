"""The operators as torch sees them: schemas say what is written, fakes give the shapes and dtypes of the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.kernels import nf4, rows, swiglu  # noqa: F401  # registers the operators
from finetune.kernels.nf4 import quantize_stack
from finetune.kernels.rows import sort_by_expert


def arguments() -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
    x, y, h, v = (torch.randn(n, 64 * m, generator=generator) for n, m in ((5, 1), (10, 1), (10, 4), (10, 2)))
    weight, sorted_rows = torch.rand(5, 2, generator=generator), sort_by_expert(index, 4)
    stack = quantize_stack(torch.randn(3, 64, 128, generator=generator))
    return {
        "dequantize_nf4": (*stack, torch.empty(3, 64, 128)),
        "sort_by_expert": (index, 4),
        "gather_rows": (x, sorted_rows.token_S),
        "combine_rows": (y, sorted_rows.position_TK, weight),
        "swiglu_forward": (h,),
        "swiglu_backward_": (h, v, weight, sorted_rows.order_S),
    }


@pytest.mark.parametrize("name", arguments())
def test_schema_and_fake(name: str) -> None:
    operator = getattr(torch.ops.moe_qlora, name).default
    torch.library.opcheck(operator, arguments()[name], test_utils=("test_schema", "test_faketensor"))


def test_all_are_tested() -> None:
    assert {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "moe_qlora" in name} == set(
        arguments()
    )
