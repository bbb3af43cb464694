"""Every formula against a brute-force count written in plain Python, and against what is known in closed form."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from finetune.routing.metrics import RouterSums, layer_loads, layer_metrics, layer_scalars, summary

Routing = list[list[tuple[list[int], list[float]]]]  # [layer][token] -> (chosen experts, probability of each expert)


def random_routing(rng: random.Random, layers: int, tokens: int, experts: int, top_k: int) -> Routing:
    def token() -> tuple[list[int], list[float]]:
        weights = [math.exp(rng.gauss(0.0, 1.5)) for _ in range(experts)]
        probs = [w / sum(weights) for w in weights]
        return sorted(range(experts), key=lambda e: -probs[e])[:top_k], probs

    return [[token() for _ in range(tokens)] for _ in range(layers)]


def to_sums(routing: Routing, experts: int, top_k: int) -> RouterSums:
    layers, tokens = len(routing), len(routing[0])
    counts = torch.zeros(layers, experts, dtype=torch.int64)
    prob_sum = torch.zeros(layers, experts, dtype=torch.float64)
    for layer, row in enumerate(routing):
        for chosen, probs in row:
            for expert in chosen:
                counts[layer, expert] += 1
            prob_sum[layer] += torch.tensor(probs, dtype=torch.float64)
    return RouterSums(counts, prob_sum, tokens, top_k)


def brute_force(layer: list[tuple[list[int], list[float]]], experts: int) -> dict[str, object]:
    """The definitions, one token at a time."""
    assignments = [expert for chosen, _ in layer for expert in chosen]
    loads = [assignments.count(expert) for expert in range(experts)]
    mean = sum(loads) / experts
    share = [n / len(assignments) for n in loads]
    return {
        "load": share,
        "max_vio": (max(loads) - mean) / mean,
        "min_utilization": min(loads) / mean,
        "max_utilization": max(loads) / mean,
        "load_entropy": -sum(f * math.log(f) for f in share if f > 0) / math.log(experts),
        "balance_loss": experts * sum(f * sum(p[e] for _, p in layer) / len(layer) for e, f in enumerate(share)),
        "dead_experts": sum(n / mean < 0.1 for n in loads),
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 4),
    tokens=st.integers(1, 40),
    experts=st.integers(2, 12),
    data=st.data(),
)
def test_every_metric_equals_the_brute_force_count(
    seed: int, layers: int, tokens: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    routing = random_routing(random.Random(seed), layers, tokens, experts, top_k)
    for got, layer in zip(layer_metrics(to_sums(routing, experts, top_k)), routing, strict=True):
        want = brute_force(layer, experts)
        assert list(got.load) == pytest.approx(want["load"], abs=1e-12)
        assert got.max_vio == pytest.approx(want["max_vio"], abs=1e-9)
        assert got.min_utilization == pytest.approx(want["min_utilization"], abs=1e-9)
        assert got.max_utilization == pytest.approx(want["max_utilization"], abs=1e-9)
        assert got.load_entropy == pytest.approx(want["load_entropy"], abs=1e-9)
        assert got.balance_loss == pytest.approx(want["balance_loss"], abs=1e-9)
        assert got.dead_experts == want["dead_experts"]


def even_sums(layers: int = 3, experts: int = 8, top_k: int = 2) -> RouterSums:
    """Token t takes experts t, t+1, ... and the router is undecided."""
    counts = torch.full((layers, experts), top_k, dtype=torch.int64)
    return RouterSums(counts, torch.full((layers, experts), 1.0, dtype=torch.float64), experts, top_k)


def test_even_routing_reads_as_balanced() -> None:
    for layer in layer_metrics(even_sums()):
        assert layer.load == (0.125,) * 8
        assert (layer.max_vio, layer.min_utilization, layer.max_utilization) == (0.0, 1.0, 1.0)
        assert layer.load_entropy == pytest.approx(1.0)
        assert layer.balance_loss == pytest.approx(1.0)
        assert layer.dead_experts == 0


def test_layers_collapsed_on_different_pairs_are_never_pooled_to_balanced() -> None:
    layers, experts, top_k, tokens = 8, 8, 2, 100
    routing: Routing = []
    for layer in range(layers):
        pair = [layer, (layer + 1) % experts]
        routing.append([(pair, [0.5 if expert in pair else 0.0 for expert in range(experts)])] * tokens)
    sums = to_sums(routing, experts, top_k)
    # The pooled loss that transformers trains with sees nothing wrong: top_k is its value for even routing.
    logits = tuple(torch.tensor([p for _, p in layer]).log().clamp(min=-1e4) for layer in routing)
    assert float(load_balancing_loss_func(logits, experts, top_k)) == pytest.approx(16.0 / 8, abs=1e-4)

    for layer_health in layer_metrics(sums):
        assert layer_health.balance_loss == pytest.approx(8.0 / top_k)
        assert layer_health.max_vio == pytest.approx(experts / top_k - 1)
        assert layer_health.load_entropy == pytest.approx(math.log(2) / math.log(8))
        assert layer_health.dead_experts == 6
    scalars = summary(layer_metrics(sums), tokens=sums.tokens)
    assert scalars["router/balance_loss_mean"] == pytest.approx(4.0)
    assert scalars["router/max_vio_mean"] == pytest.approx(3.0)
    assert scalars["router/dead_experts"] == 48


def test_balance_loss_of_one_layer_is_transformers_loss_over_k() -> None:
    torch.manual_seed(0)
    for experts, top_k in ((8, 2), (16, 4), (6, 1)):
        logits = torch.randn(50, experts)
        probs = logits.softmax(-1)
        counts = torch.zeros(1, experts, dtype=torch.int64)
        for row in probs.topk(top_k).indices.tolist():
            for expert in row:
                counts[0, expert] += 1
        sums = RouterSums(counts, probs.double().sum(0, keepdim=True), 50, top_k)
        theirs = float(load_balancing_loss_func((logits,), experts, top_k))
        assert layer_metrics(sums)[0].balance_loss == pytest.approx(theirs / top_k, rel=1e-6)


def test_one_token() -> None:
    sums = to_sums([[([3, 1], [0.1, 0.3, 0.0, 0.6])]], 4, 2)
    (layer,) = layer_metrics(sums)
    assert layer.load == (0.0, 0.5, 0.0, 0.5)
    assert layer.max_vio == 1.0
    assert layer.min_utilization == 0.0
    assert layer.load_entropy == pytest.approx(0.5)
    assert layer.balance_loss == pytest.approx(4 * (0.5 * 0.3 + 0.5 * 0.6))


def test_windows_are_added_before_any_ratio() -> None:
    rng = random.Random(1)
    windows = [random_routing(rng, 2, tokens, 8, 2) for tokens in (3, 16, 1)]
    whole: Routing = [[token for window in windows for token in window[layer]] for layer in range(2)]
    total = to_sums(windows[0], 8, 2) + to_sums(windows[1], 8, 2) + to_sums(windows[2], 8, 2)
    assert total.tokens == 20
    for got, layer in zip(layer_metrics(total), whole, strict=True):
        assert got.balance_loss == pytest.approx(brute_force(layer, 8)["balance_loss"])
        assert got.max_vio == pytest.approx(brute_force(layer, 8)["max_vio"])
    mean_of_ratios = sum(layer_metrics(to_sums(w, 8, 2))[0].max_vio for w in windows) / 3
    assert mean_of_ratios > layer_metrics(total)[0].max_vio


def test_summary_takes_the_worst_layer_where_a_mean_would_hide_it() -> None:
    even = even_sums(layers=3)
    counts, prob_sum = even.counts.clone(), even.prob_sum.clone()
    counts[1] = torch.tensor([8, 8, 0, 0, 0, 0, 0, 0])
    layers = layer_metrics(RouterSums(counts, prob_sum, even.tokens, even.top_k))
    scalars = summary(layers, tokens=even.tokens)
    assert scalars["router/max_vio_worst"] == pytest.approx(3.0)
    assert scalars["router/max_vio_mean"] == pytest.approx(1.0)
    assert scalars["router/min_utilization_worst"] == 0.0
    assert scalars["router/load_entropy_worst"] == pytest.approx(1 / 3)
    assert scalars["router/dead_experts"] == 6
    assert scalars["router/tokens"] == 8


def test_names() -> None:
    layers = layer_metrics(even_sums(layers=12))
    scalars = layer_scalars(layers)
    assert len(scalars) == 12 * 5
    assert scalars["router/layer_07/max_vio"] == 0.0
    assert scalars["router/layer_11/balance_loss"] == pytest.approx(1.0)
    assert all(isinstance(value, float) for value in scalars.values())
    assert layer_loads(layers)["router/layer_00/load"] == [0.125] * 8


def test_a_window_that_missed_a_token_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="missed tokens"):
        RouterSums(torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.float64), tokens=2, top_k=2)
    with pytest.raises(AssertionError, match="no token"):
        layer_metrics(RouterSums(torch.zeros(1, 2).long(), torch.zeros(1, 2).double(), tokens=0, top_k=2))
