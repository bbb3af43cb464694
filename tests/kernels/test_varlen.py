"""Attention over sequences in one row, against softmax written out in float64, and what its CUDA path asks of torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from finetune.kernels import varlen
from finetune.kernels.varlen import compute_dtype, flash_serves, reproducible, varlen_attention

# One-token and empty sequences, and one length for all.
LENGTHS = ([7, 1, 12, 1, 3], [5], [1, 1, 1], [0, 4, 0, 3, 0], [6, 6, 6])
HEADS = ((4, 4), (4, 1), (8, 2))


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(
    tokens: int, heads: int, kv_heads: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, n, 16, generator=generator, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def brute_force(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None) -> Tensor:
    """Token by token and head by head."""
    rows: list[Tensor] = []
    group, start = q.shape[1] // k.shape[1], 0
    for length in lengths:
        for token in range(start, start + length):
            first = start if window is None else max(start, token - window + 1)
            for head in range(q.shape[1]):
                scores = k[first : token + 1, head // group] @ q[token, head] * scale
                rows.append(scores.softmax(0) @ v[first : token + 1, head // group])
        start += length
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_are_those_of_the_sequences_alone(
    lengths: list[int], heads: int, kv_heads: int, window: int | None
) -> None:
    q, k, v = inputs(sum(lengths), heads, kv_heads)
    out = varlen_attention(q, k, v, boundaries(lengths), max(lengths), 0.3, window=window)
    expected = brute_force(q, k, v, lengths, 0.3, window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_sequence_leaks_into_another(lengths: list[int]) -> None:
    """Bit by bit, for every sequence changed in turn."""
    q, k, v = inputs(sum(lengths), 4, 2, dtype=torch.float32)
    cu_seqlens = boundaries(lengths)
    before = varlen_attention(q, k, v, cu_seqlens, max(lengths), 0.25)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[begin:end] = False
        changed = [torch.where(others[:, None, None], x, x + 1) for x in (q, k, v)]
        after = varlen_attention(*changed, cu_seqlens, max(lengths), 0.25)
        assert torch.equal(after[others], before[others])
        assert end == begin or not torch.equal(after[~others], before[~others])


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = inputs(9, 4, 2, dtype=torch.float32)
    mixed = (q, k, v.bfloat16())  # what fp32 weights and rotary embeddings give under autocast
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(*mixed, boundaries([4, 5]), 5, 0.25)
        assert compute_dtype(q) == torch.bfloat16
        assert compute_dtype(q.double()) == torch.float64
    assert out.dtype == torch.bfloat16
    expected = varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), boundaries([4, 5]), 5, 0.25)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_flash_serves_only_16_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_flash", lambda index: True)
    gpu = torch.device("cuda", 0)
    assert flash_serves(gpu, torch.bfloat16, 128)
    assert flash_serves(gpu, torch.float16, 72)
    assert not flash_serves(gpu, torch.float32, 128)
    assert not flash_serves(gpu, torch.bfloat16, 100)
    assert not flash_serves(gpu, torch.bfloat16, 264)
    assert not flash_serves(torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.parametrize("window", [None, 8])
def test_torch_accepts_the_calls_of_the_cuda_path(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the operators' own shape functions check arguments and give shapes."""
    monkeypatch.setattr(varlen, "flash_serves", lambda *_: True)
    q, k, v = (torch.empty(20, n, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (8, 2, 2))
    out = varlen_attention(q, k, v, torch.empty(3, dtype=torch.int32, device="meta"), 12, 0.1, window=window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out.backward(torch.empty_like(out))
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("on", [True, False])
def test_the_backward_operator_alone_runs_with_deterministic_algorithms(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    original = torch.ops.aten._flash_attention_backward

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(varlen, "flash_serves", lambda *_: True)
    monkeypatch.setattr(varlen, "REPRODUCIBLE_BACKWARD", on)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", watched)
    q, k, v = (torch.empty(6, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    varlen_attention(q, k, v, torch.empty(2, dtype=torch.int32, device="meta"), 6, 0.1).sum().backward()
    assert seen == [on]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("fill", [True, False])
def test_reproducible_restores_what_was_set(mode: int, fill: bool) -> None:
    before = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill
        with reproducible():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not deterministic.fill_uninitialized_memory
        with pytest.raises(ZeroDivisionError), reproducible():
            _ = 1 // 0
        assert torch.get_deterministic_debug_mode() == mode
        assert deterministic.fill_uninitialized_memory == fill
    finally:
        torch.set_deterministic_debug_mode(before[0])
        deterministic.fill_uninitialized_memory = before[1]
