"""The rule for the backend, and both backends' products against one matrix product an expert."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import DeviceError
from finetune.kernels import expert_operation
from finetune.kernels.expert_operation import BackendChoice, GroupedMatmul, LoopMatmul, choose_backend
from finetune.kernels.nf4 import dequantize_reference, quantize_nf4

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "capability", "tokens", "expected"),
    [
        ("auto", CUDA, BF16, (9, 0), 2048, "grouped"),
        ("auto", CUDA, BF16, (9, 0), 4096, "loop"),
        ("auto", CUDA, BF16, (10, 0), 4, "grouped"),
        ("auto", CUDA, BF16, (9, 0), 3, "loop"),
        ("auto", CUDA, FP16, (9, 0), 300, "loop"),
        ("auto", CUDA, BF16, (8, 0), 300, "loop"),
        ("auto", CUDA, BF16, (12, 0), 300, "loop"),
        ("auto", CPU, BF16, (9, 0), 300, "loop"),
        ("loop", CUDA, BF16, (9, 0), 1, "loop"),
        ("grouped", CUDA, BF16, (9, 0), 100_000, "grouped"),
    ],
)
def test_rule(
    wanted: BackendChoice,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tokens: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_operation, "_capability", lambda device: capability)
    assert choose_backend(wanted, device, dtype, rows=2 * tokens, experts=8, weights=4096 * 28672) == expected


def test_narrow_experts_are_grouped_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-30B-A3B and OLMoE at 4 x 4096 tokens and top-8."""
    monkeypatch.setattr(expert_operation, "_capability", lambda device: (9, 0))
    for experts, width in ((128, 1536), (64, 2048)):
        rows = 8 * 4 * 4096
        assert choose_backend("auto", CUDA, BF16, rows=rows, experts=experts, weights=2048 * width) == "grouped"


@pytest.mark.parametrize(
    ("device", "dtype", "capability"), [(CPU, BF16, (9, 0)), (CUDA, FP16, (9, 0)), (CUDA, BF16, (8, 6))]
)
def test_grouped_where_it_does_not_run(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_operation, "_capability", lambda device: capability)
    with pytest.raises(DeviceError) as error:
        choose_backend("grouped", device, dtype, rows=1, experts=8, weights=1)
    name = str(dtype).removeprefix("torch.")
    assert str(error.value) == (
        f"the grouped backend of the experts does not run in {name} on {device.type}\n"
        "  where: model.experts_backend\n"
        "  allowed: grouped: bfloat16 on a GPU of compute capability 9 or 10 (H100, H200, B200); loop: anywhere\n"
        "  fix: set model.experts_backend=auto"
    )


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 7, 0], [0, 0, 0], [2, 2, 2]])
@pytest.mark.parametrize("backend", [LoopMatmul, GroupedMatmul])
def test_products(counts: list[int], backend: type[LoopMatmul | GroupedMatmul]) -> None:
    """torch's grouped product runs on the CPU too, in bfloat16."""
    stack = quantize_nf4(torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0)))
    weights = dequantize_reference(stack, BF16)
    products = backend(torch.tensor(counts).cumsum(0).int())
    x, grad = torch.randn(sum(counts), 128).to(BF16), torch.randn(sum(counts), 64).to(BF16)
    y = torch.cat([rows @ weight.T for rows, weight in zip(x.split(counts), weights, strict=True)])
    grad_x = torch.cat([rows @ weight for rows, weight in zip(grad.split(counts), weights, strict=True)])
    for _ in range(2):  # the second time the loop knows its counts
        torch.testing.assert_close(products.forward(x, stack), y)
        torch.testing.assert_close(products.backward(grad, stack), grad_x)
