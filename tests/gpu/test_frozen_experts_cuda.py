"""The frozen experts on a GPU, in Mixtral 8x7B's own widths, against float64 on the dequantized weights.

The baseline is transformers' way with 16-bit weights: per expert, in the dtype throughout, choices added in that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.expert_operation import Backend, frozen_experts
from finetune.kernels.nf4 import Nf4Weights, dequantize_reference, quantize_nf4
from finetune.kernels.packed_experts import dequantize_expert, dequantize_experts

DEVICE = torch.device("cuda")
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 4096, 14336, 2
Stacks = tuple[Nf4Weights, Nf4Weights]
BACKENDS: dict[torch.dtype, tuple[Backend, ...]] = {torch.bfloat16: ("grouped", "loop"), torch.float16: ("loop",)}


@pytest.fixture(scope="module")
def stacks() -> Iterator[Stacks]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(out: int, in_: int) -> Nf4Weights:
        weight = torch.empty(EXPERTS, out, in_, dtype=torch.bfloat16, device=DEVICE)
        return quantize_nf4(weight.normal_(0, in_**-0.5, generator=generator))

    yield draw(2 * INTERMEDIATE, HIDDEN), draw(HIDDEN, INTERMEDIATE)
    torch.cuda.empty_cache()


# name -> experts that get no token
ROUTINGS: dict[str, tuple[int, ...]] = {
    "random": (),
    "first empty": (0,),
    "last empty": (7,),
    "all but two empty": (0, 1, 3, 4, 6, 7),
    "one pair": (0, 1, 2, 5, 6, 7),
}


def make_case(tokens: int, routing: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, index, weight, gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    scores = torch.randn(tokens, EXPERTS, device=DEVICE, generator=generator)
    scores[:, list(ROUTINGS[routing])] = -torch.inf
    weight, index = scores.softmax(-1).topk(TOP_K, -1)
    x, grad = (torch.randn(tokens, HIDDEN, device=DEVICE, generator=generator).to(dtype) for _ in range(2))
    return x, index, weight / weight.sum(-1, keepdim=True), grad


def plain(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    grad: Tensor,
    stacks: Stacks,
    dtype: torch.dtype,
    weights: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Output and both gradients by autograd through one expert after the other, everything in `dtype`.

    The weights are first rounded to the 16 bits that the products see, so that results differ by arithmetic alone.
    """
    x, weight = x.to(dtype).detach().requires_grad_(), weight.to(dtype).detach().requires_grad_()
    y = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, choice = (index == expert).nonzero(as_tuple=True)
        gate_up, down = (dequantize_expert(stack, expert, weights).to(dtype) for stack in stacks)
        gate, up = F.linear(x[token], gate_up).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, down) * weight[token, choice].unsqueeze(-1)
        y = y.index_add(0, token, rows)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(dtype))]


def ours(
    x: Tensor, index: Tensor, weight: Tensor, grad: Tensor, stacks: Stacks, backend: Backend, keep: bool = True
) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = frozen_experts(x, index, weight, *stacks, backend=backend, keep_gate_up=keep)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def relative(found: list[Tensor], true: list[Tensor]) -> list[float]:
    return [((f.double() - t).norm() / t.norm()).item() for f, t in zip(found, true, strict=True)]


CASES = [(tokens, "random") for tokens in (1, 7, 300, 8192)] + [(300, name) for name in ROUTINGS if name != "random"]


@pytest.mark.parametrize("dtype", BACKENDS, ids=str)
@pytest.mark.parametrize(("tokens", "routing"), [*CASES, (8192, "one pair")])
def test_at_most_a_fifth_worse_than_plain(tokens: int, routing: str, dtype: torch.dtype, stacks: Stacks) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    case = make_case(tokens, routing, dtype)
    true = plain(*case, stacks, torch.float64, weights=dtype)
    allowed = relative(plain(*case, stacks, dtype, weights=dtype), true)
    for backend in BACKENDS[dtype]:
        for keep in (True, False):
            errors = relative(ours(*case, stacks, backend, keep), true)
            assert all(error <= 1.2 * limit for error, limit in zip(errors, allowed, strict=True))


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_past_the_31_bit_line(backend: Backend, stacks: Stacks) -> None:
    """40,000 tokens: 80,000 rows of 28,672 elements. A token's results do not depend on the others: the last 300 are
    compared with the same tokens alone in float64."""
    x, index, weight, grad = make_case(40_000, "random", torch.bfloat16)
    assert 2 * x.shape[0] * 2 * INTERMEDIATE > 2**31
    found = [result[-300:] for result in ours(x, index, weight, grad, stacks, backend)]
    tail = x[-300:], index[-300:], weight[-300:], grad[-300:]
    true = plain(*tail, stacks, torch.float64)
    limits = relative(plain(*tail, stacks, torch.bfloat16), true)
    assert all(error <= 1.2 * limit for error, limit in zip(relative(found, true), limits, strict=True))


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_same_bits_every_time(backend: Backend, stacks: Stacks) -> None:
    case = make_case(2048, "random", torch.bfloat16)
    first = ours(*case, stacks, backend)
    for keep in (True, True, False):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(*case, stacks, backend, keep), strict=True))


def test_the_grouped_backend_never_synchronizes(stacks: Stacks) -> None:
    x, index, weight, grad = make_case(300, "random", torch.bfloat16)
    ours(x, index, weight, grad, stacks, "grouped")  # compiles
    leaf, leaf_weight = x.requires_grad_(), weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        frozen_experts(leaf, index, leaf_weight, *stacks, backend="grouped").backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dequantization_has_the_bits_of_the_codec(dtype: torch.dtype, stacks: Stacks) -> None:
    small = quantize_nf4(torch.randn(3, 40, 192, device=DEVICE))
    assert torch.equal(dequantize_experts(small, dtype), dequantize_reference(small, dtype))
    one = Nf4Weights(*(tensor[5:6] for tensor in stacks[1]))
    assert torch.equal(dequantize_experts(one, dtype), dequantize_reference(one, dtype))
    assert torch.equal(dequantize_experts(one, dtype)[0], dequantize_expert(stacks[1], 5, dtype))


def test_swiglu_backward_in_place_is_seen_by_autograd(stacks: Stacks) -> None:
    """A second backward pass would read h after its gradient took its place: torch must refuse."""
    x, index, weight, grad = make_case(7, "random", torch.bfloat16)
    y = frozen_experts(x.requires_grad_(), index, weight, *stacks, backend="loop")
    y.backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_bits_and_values_equal_the_cpu() -> None:
    """What a GPU quantized for training, the CPU makes again for the merge: every byte, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn(2, 1024, 14336, generator=torch.Generator().manual_seed(0)).to(dtype)
        cpu, cuda = quantize_nf4(weight), quantize_nf4(weight.cuda())
        for field, tensor in cpu._asdict().items():
            assert torch.equal(getattr(cuda, field).cpu(), tensor), (dtype, field)
    moved = cpu._replace(**{field: tensor.cuda() for field, tensor in cpu._asdict().items()})
    for expert in range(2):
        on_cuda = dequantize_expert(moved, expert, torch.float32).cpu()
        torch.testing.assert_close(on_cuda, dequantize_reference(cpu, torch.float32)[expert], rtol=1e-6, atol=1e-7)
