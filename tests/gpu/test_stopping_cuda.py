"""Steps that are not finite on a GPU: what must happen on the device, and that the host does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.train.test_stopping import Training


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: torch.optim.RMSprop(p, lr=0.1)]
)
def test_an_update_is_not_applied_and_nobody_waits(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    run = Training(make, "cuda")
    run.step(1.0)
    weight = run.model.weight.detach().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(float("nan"))
        same = (run.model.weight == weight).all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(same)
    assert run.told == [], "read a step later"
    for _ in range(3):
        run.step(float("inf"))
    assert run.stopping.stopped
    assert [line.partition(":")[0] for line in run.told] == ["step 2", "step 3", "step 4"]
    assert run.state.global_step == 5
    assert bool(run.model.weight.isfinite().all())
