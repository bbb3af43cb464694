"""Variable-length attention on a GPU, in the head shape of Mixtral 8x7B: exact, reproducible, no synchronization."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.kernels.varlen import flash_serves, varlen_attention, varlen_attention_reference
from finetune.moe.attention import read_packing
from tests.models import tiny_model, tokens

DEVICE = torch.device("cuda")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
LENGTHS: dict[str, list[int]] = {
    "one long": [4096],
    "equal": [1024] * 4,
    "below 16": [1, 3, 15, 2, 7, 1, 1, 8, 14],
    "mixed": [1, 500, 16, 0, 3, 1024, 17, 0, 129, 128, 1],
}


@contextmanager
def synchronization_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_case(
    lengths: list[int], *, heads: int = HEADS, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(q, k, v), gradient of the output, boundaries."""
    generator = torch.Generator(DEVICE).manual_seed(sum(lengths))
    q, k, v, grad = (
        torch.randn(sum(lengths), n, HEAD_DIM, device=DEVICE, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return [q, k, v], grad, boundaries


def ours(
    qkv: list[Tensor],
    grad: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int | None = None,
    rows: int | None = None,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = varlen_attention(*leaves, boundaries, longest, SCALE, window=window, rows=rows)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def known_rows(lengths: list[int]) -> list[int | None]:
    """What the caller may say of the rows: nothing, and where all are of one length, how many they are."""
    return [None, len(lengths)] if len(set(lengths)) == 1 else [None]


def sdpa(
    qkv: list[Tensor], grad: Tensor, boundaries: Tensor, dtype: torch.dtype, window: int | None = None
) -> list[Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in qkv]
    out = varlen_attention_reference(*leaves, boundaries, SCALE, window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def relative(found: list[Tensor], true: list[Tensor]) -> list[float]:
    return [((f.double() - t).norm() / t.norm()).item() for f, t in zip(found, true, strict=True)]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(HEADS, KV_HEADS), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_at_most_a_fifth_worse_than_sdpa(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None
) -> None:
    """Output and the three gradients, against float64."""
    lengths = LENGTHS[name]
    case = make_case(lengths, heads=heads, kv_heads=kv_heads, dtype=dtype)
    assert flash_serves(DEVICE, dtype, HEAD_DIM)
    true = sdpa(*case, torch.float64, window)
    allowed = relative(sdpa(*case, dtype, window), true)
    for rows in known_rows(lengths):
        errors = relative(ours(*case, max(lengths), window, rows), true)
        shown = " ".join(f"{error:.2e}/{limit:.2e}" for error, limit in zip(errors, allowed, strict=True))
        print(f"{name} {dtype} {heads}:{kv_heads} window {window} rows {rows}: out, dq, dk, dv (ours/sdpa) {shown}")
        assert all(error <= 1.2 * limit for error, limit in zip(errors, allowed, strict=True))


@pytest.mark.parametrize("name", LENGTHS)
def test_five_runs_give_the_same_bits(name: str) -> None:
    case, longest = make_case(LENGTHS[name]), max(LENGTHS[name])
    for rows in known_rows(LENGTHS[name]):
        first = ours(*case, longest, rows=rows)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(first, ours(*case, longest, rows=rows), strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_sequence_leaks_into_another() -> None:
    lengths = LENGTHS["mixed"]
    qkv, grad, boundaries = make_case(lengths)
    before = ours(qkv, grad, boundaries, max(lengths))
    for begin, end in itertools.pairwise(boundaries.tolist()):
        others = torch.ones(sum(lengths), dtype=torch.bool, device=DEVICE)
        others[begin:end] = False
        changed = [torch.where(others[:, None, None], x, x + 1) for x in qkv]
        after = ours(changed, grad, boundaries, max(lengths))
        assert all(torch.equal(a[others], b[others]) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", LENGTHS)
def test_nothing_waits_for_the_host(name: str) -> None:
    case, longest = make_case(LENGTHS[name]), max(LENGTHS[name])
    for rows in known_rows(LENGTHS[name]):
        ours(*case, longest, rows=rows)
        with synchronization_refused():
            ours(*case, longest, rows=rows)


def model_batches() -> dict[str, dict[str, Any]]:
    ids = tokens(2, 24)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :7], right[1, 15:] = 0, 0
    packed = torch.tensor([0, 7, 8, 30, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in packed.diff().tolist()])[None]
    keywords = {"cu_seq_lens_q": packed, "cu_seq_lens_k": packed, "max_length_q": 22, "max_length_k": 22}
    return {
        "packed": {"input_ids": ids.view(1, -1), "position_ids": positions, **keywords},
        "no mask": {"input_ids": ids},
        "full mask": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "left": {"input_ids": ids, "attention_mask": left},
        "right": {"input_ids": ids, "attention_mask": right},
    }


@pytest.mark.parametrize("kind", model_batches())
def test_a_decoder_never_waits_for_the_host_and_agrees_with_the_cpu(kind: str) -> None:
    """All of a Mixtral but its experts, whose plain implementation synchronizes."""
    batch = model_batches()[kind]
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        model = tiny_model("mixtral", dtype=torch.float64).to(device, dtype)
        for layer in model.model.layers:
            layer.mlp = nn.Identity()
        model.set_attn_implementation("varlen")
        read_packing(model)
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}

        def step(model: Any = model, moved: dict[str, Any] = moved) -> Tensor:
            logits = model(**moved, use_cache=False).logits
            logits.square().mean().backward()
            return logits.detach()

        step()
        if device == "cuda":
            with synchronization_refused():
                logits = step()
        else:
            logits = step()
        results.append(logits.double().cpu())
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected, found = (logits[real] for logits in results)
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_mask_with_holes_goes_to_sdpa_when_nothing_trains() -> None:
    ids = tokens(2, 12).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 5] = 0
    model = tiny_model("mixtral", dtype=torch.bfloat16).to(DEVICE)
    results = []
    for name in ("sdpa", "varlen"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).logits)
    assert torch.equal(*results)
