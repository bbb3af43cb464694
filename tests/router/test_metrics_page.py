"""docs/router_metrics.md names what a run logs, and only that."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from finetune.router.drift import drift, drift_scalars, drift_vectors
from finetune.router.metrics import LAYER_METRICS, RouterSums, layer_metrics
from finetune.router.names import brief_scalars, layer_vectors, part_scalars

PAGE = (Path(__file__).parents[2] / "docs" / "router_metrics.md").read_text(encoding="utf-8")
LAYERS, EXPERTS, TOKENS = 8, 4, 6


def sums() -> RouterSums:
    """Six tokens, all to experts 0 and 1."""
    counts = torch.tensor([[TOKENS, TOKENS, 0, 0]] * LAYERS)
    ones = torch.ones(LAYERS, dtype=torch.float64)
    same = torch.full((LAYERS,), TOKENS - 1)
    probabilities = torch.full((LAYERS, EXPERTS), TOKENS / EXPERTS, dtype=torch.float64)
    return RouterSums(counts, probabilities, TOKENS, 2, ones, ones, ones, TOKENS - 1, same, same)


def test_every_logged_name_is_on_the_page() -> None:
    layers = layer_metrics(sums())
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    moved = drift(logits, logits.flip(2), 2)
    scalars = {
        **brief_scalars(layers, tokens=TOKENS),
        **part_scalars({"prompt": sums(), "completion": sums()}),
        **drift_scalars(moved),
    }
    named = set(re.findall(r"`(router/[a-z_0-9/]+)`", PAGE))
    assert set(scalars) <= named
    vectors = {**layer_vectors(layers), **drift_vectors(moved)}
    known = {
        *scalars,
        *vectors,
        *(f"router/aux/{name}" for name in ("balance", "z", "weighted")),
        "router/layer_07/max_vio",
    }
    assert named <= known
    for name in vectors:
        if name.endswith("/load"):  # one of all layers stands for them
            continue
        assert f"`{name}`" in PAGE or f"`{name.rpartition('/')[2]}`" in PAGE, name


def test_the_table_of_layer_metrics_is_complete() -> None:
    section = PAGE.split("## Of each layer")[1].split("## In every log")[0]
    assert set(re.findall(r"^\| `([a-z_0-9]+)` \|", section, flags=re.MULTILINE)) == set(LAYER_METRICS)
