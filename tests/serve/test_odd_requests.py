"""A hundred odd requests at once, of a sound model and of an adapter of NaN, in a pool that is too small for them.

`scripts/fuzz_engine.py` sends thousands to a server that runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
import torch

from finetune.infer.engine import Engine
from finetune.infer.pages import page_bytes
from finetune.infer.residency import EngineSettings
from finetune.moe.arch import MoeArch
from finetune.moe.load import read_config
from tests.conftest import REPOSITORY
from tests.models import save_lora
from tests.serve.serving import serving


def test_nobody_is_left_unanswered(talkative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])
    import fuzz_engine

    page = page_bytes(MoeArch.from_config(read_config(str(talkative))), torch.float32)
    settings = EngineSettings(max_batch=8, max_length=128, kv_gib=4 * page / 2**30)
    adapters = {"broken": str(save_lora(talkative, tmp_path / "adapter", std=float("nan")))}
    with (
        Engine.load(str(talkative), name="tiny", adapters=adapters, device="cpu", settings=settings) as engine,
        serving(engine) as served,
    ):
        found = fuzz_engine.run(served.root, 100, 16, seed=0)
        stats = engine.stats()
        metrics = httpx.get(served.root + "/metrics").text.splitlines()
    print(found, stats)
    assert fuzz_engine.unanswered(found) == 0
    assert found["plain"] == {"answered": 16}
    assert found["health"] == 200
    assert {"200", "400", "500"} <= found["odd"].keys()
    assert (engine.failure, engine.restarts) == (None, 0)
    assert stats.failed > 0
    assert stats.preempted > 0
    assert f"finetune_answers_failed_total {float(stats.failed)}" in metrics
    assert f"finetune_answers_preempted_total {float(stats.preempted)}" in metrics
