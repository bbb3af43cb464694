"""The trace of routing: the paper's shares, counted."""

from __future__ import annotations

import pytest
import torch

from finetune.bench.offload import SHARED, make_trace, shared_share


def test_consecutive_tokens_share_experts_as_often_as_the_paper_counts() -> None:
    steps, layers = 4000, 32
    trace = make_trace(steps, 2, layers, seed=0)
    assert trace.shape == (steps, 2, layers, 2)
    assert bool((trace[..., 0] != trace[..., 1]).all())
    assert int(trace.min()) == 0
    assert int(trace.max()) == 7
    for layer, share in SHARED.items():
        pairs = trace[:, :, layer]
        common = (pairs[1:, :, :, None] == pairs[:-1, :, None, :]).any(-1)
        # Four standard deviations of 8,000 draws.
        assert common.any(-1).float().mean().item() == pytest.approx(share, abs=4 * (0.25 / 8000) ** 0.5)
        assert common.all(-1).float().mean().item() == pytest.approx(share / 13, abs=0.01)
        load = torch.bincount(pairs.flatten(), minlength=8) / pairs.numel()
        assert load.min() > 0.11
    assert shared_share(7, 32) == pytest.approx(0.480 + 7 / 15 * (0.637 - 0.480))
    assert torch.equal(trace[:10], make_trace(steps, 2, layers, seed=0)[:10])
