"""Every formula against a brute-force count written in plain Python, and against what is known in closed form."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from finetune.router.metrics import (
    LAYER_METRICS,
    RouterSums,
    layer_metrics,
    noise_floor,
    random_repetition,
)
from finetune.router.names import brief_scalars, layer_scalars, layer_vectors, part_scalars
from tests.router.routing_models import sums_of

Routing = list[list[list[float]]]  # router logits [layer][token][expert]


def random_routing(rng: random.Random, layers: int, tokens: int, experts: int) -> Routing:
    return [[[rng.gauss(0.0, 1.5) for _ in range(experts)] for _ in range(tokens)] for _ in range(layers)]


def brute_force(layer: list[list[float]], documents: list[int], top_k: int) -> dict[str, object]:
    """The definitions, one token at a time."""
    experts, tokens = len(layer[0]), len(layer)
    probs = [[math.exp(x) / sum(map(math.exp, token)) for x in token] for token in layer]
    chosen = [sorted(range(experts), key=lambda e, token=token: -token[e])[:top_k] for token in layer]
    assignments = [expert for each in chosen for expert in each]
    loads = [assignments.count(expert) for expert in range(experts)]
    mean = sum(loads) / experts
    share = [n / len(assignments) for n in loads]
    neighbours = [(i, i + 1) for i in range(tokens - 1) if documents[i] == documents[i + 1]]
    return {
        "load": share,
        "max_vio": (max(loads) - mean) / mean,
        "min_utilization": min(loads) / mean,
        "max_utilization": max(loads) / mean,
        "load_cv": math.sqrt(sum((n - mean) ** 2 for n in loads) / experts) / mean,
        "load_entropy": -sum(f * math.log(f) for f in share if f > 0) / math.log(experts),
        "token_entropy": -sum(p * math.log(p) for row in probs for p in row if p > 0) / tokens,
        "top1_prob": sum(map(max, probs)) / tokens,
        "z_loss": sum(math.log(sum(map(math.exp, token))) ** 2 for token in layer) / tokens,
        "balance_loss": experts * sum(f * sum(p[e] for p in probs) / tokens for e, f in enumerate(share)),
        "dead_experts": sum(n / mean < 0.1 for n in loads),
        "repeat_first": sum(chosen[i][0] == chosen[j][0] for i, j in neighbours) / (len(neighbours) or math.nan),
        "repeat_any": sum(bool(set(chosen[i]) & set(chosen[j])) for i, j in neighbours) / (len(neighbours) or math.nan),
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
    documents = sorted(data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)))
    routing = random_routing(random.Random(seed), layers, tokens, experts)
    for got, layer in zip(layer_metrics(sums_of(routing, top_k, documents)), routing, strict=True):
        want = brute_force(layer, documents, top_k)
        assert list(got.load) == pytest.approx(want["load"], abs=1e-12)
        for name in LAYER_METRICS:
            assert getattr(got, name) == pytest.approx(want[name], abs=1e-9, nan_ok=True), name


def even_sums(layers: int = 3, experts: int = 8, top_k: int = 2) -> RouterSums:
    """Token t takes experts t, t+1, ... and the router is nearly undecided."""
    tokens = [[1e-9 * (-((e - t) % experts)) for e in range(experts)] for t in range(experts)]
    return sums_of([tokens] * layers, top_k)


def test_even_routing_reads_as_balanced() -> None:
    for layer in layer_metrics(even_sums()):
        assert layer.load == (0.125,) * 8
        assert (layer.max_vio, layer.min_utilization, layer.max_utilization) == (0.0, 1.0, 1.0)
        assert layer.load_cv == 0.0
        assert layer.load_entropy == pytest.approx(1.0)
        assert layer.token_entropy == pytest.approx(math.log(8))
        assert layer.top1_prob == pytest.approx(1 / 8)
        assert layer.z_loss == pytest.approx(math.log(8) ** 2)
        assert layer.balance_loss == pytest.approx(1.0)
        assert layer.dead_experts == 0
        assert (layer.repeat_first, layer.repeat_any) == (0.0, 1.0)


def test_layers_collapsed_on_different_pairs_are_never_pooled_to_balanced() -> None:
    layers, experts, top_k, tokens = 8, 8, 2, 100
    routing: Routing = []
    for layer in range(layers):
        pair = [layer, (layer + 1) % experts]
        routing.append([[0.0 if expert in pair else -50.0 for expert in range(experts)]] * tokens)
    sums = sums_of(routing, top_k)
    # The pooled loss that transformers trains with sees nothing wrong: top_k is its value for even routing.
    logits = tuple(torch.tensor(layer) for layer in routing)
    assert float(load_balancing_loss_func(logits, experts, top_k)) == pytest.approx(16.0 / 8, abs=1e-4)

    for layer_health in layer_metrics(sums):
        assert layer_health.balance_loss == pytest.approx(8.0 / top_k)
        assert layer_health.max_vio == pytest.approx(experts / top_k - 1)
        assert layer_health.load_entropy == pytest.approx(math.log(2) / math.log(8))
        assert layer_health.token_entropy == pytest.approx(math.log(2))
        assert layer_health.dead_experts == 6
        assert (layer_health.repeat_first, layer_health.repeat_any) == (1.0, 1.0)
    scalars = brief_scalars(layer_metrics(sums), tokens=sums.tokens)
    assert scalars["router/balance_loss_mean"] == pytest.approx(4.0)
    assert scalars["router/max_vio_mean"] == pytest.approx(3.0)
    assert scalars["router/dead_experts"] == 48


def test_balance_loss_of_one_layer_is_transformers_loss_over_k() -> None:
    torch.manual_seed(0)
    for experts, top_k in ((8, 2), (16, 4), (6, 1)):
        logits = torch.randn(50, experts)
        sums = sums_of([logits.tolist()], top_k)
        theirs = float(load_balancing_loss_func((logits,), experts, top_k))
        assert layer_metrics(sums)[0].balance_loss == pytest.approx(theirs / top_k, rel=1e-6)


def test_one_token_has_no_neighbours() -> None:
    (layer,) = layer_metrics(sums_of([[[0.0, 2.0, 1.0, 3.0]]], 2))
    assert layer.load == (0.0, 0.5, 0.0, 0.5)
    assert (layer.max_vio, layer.min_utilization) == (1.0, 0.0)
    assert layer.load_entropy == pytest.approx(0.5)
    assert math.isnan(layer.repeat_first)
    # Scalar loggers get no nan; the file, which is by layer, keeps the place.
    assert "router/repeat_first_mean" not in brief_scalars([layer], tokens=1)
    assert "router/layer_00/repeat_first" not in layer_scalars([layer])
    assert len(layer_vectors([layer])["router/by_layer/repeat_first"]) == 1


def test_windows_are_added_before_any_ratio() -> None:
    rng = random.Random(1)
    windows = [random_routing(rng, 2, tokens, 8) for tokens in (3, 16, 1)]
    total = sums_of(windows[0], 2) + sums_of(windows[1], 2) + sums_of(windows[2], 2)
    assert (total.tokens, total.pairs) == (20, 17)
    documents = [0] * 3 + [1] * 16 + [2]
    for index, got in enumerate(layer_metrics(total)):
        want = brute_force([token for window in windows for token in window[index]], documents, 2)
        for name in LAYER_METRICS:
            assert getattr(got, name) == pytest.approx(want[name]), name
    mean_of_ratios = sum(layer_metrics(sums_of(window, 2))[0].max_vio for window in windows) / 3
    assert mean_of_ratios > layer_metrics(total)[0].max_vio


def test_brief_takes_the_worst_layer_where_a_mean_would_hide_it() -> None:
    even = even_sums(layers=3)
    counts = even.counts.clone()
    counts[1] = torch.tensor([8, 8, 0, 0, 0, 0, 0, 0])
    scalars = brief_scalars(layer_metrics(replace(even, counts=counts)), tokens=even.tokens)
    assert scalars["router/max_vio_worst"] == pytest.approx(3.0)
    assert scalars["router/max_vio_mean"] == pytest.approx(1.0)
    assert scalars["router/min_utilization_worst"] == 0.0
    assert scalars["router/load_entropy_worst"] == pytest.approx(1 / 3)
    assert scalars["router/dead_experts"] == 6
    assert scalars["router/tokens"] == 8


def test_names() -> None:
    layers = layer_metrics(even_sums(layers=12))
    scalars = layer_scalars(layers)
    assert len(scalars) == 12 * len(LAYER_METRICS)
    assert scalars["router/layer_07/max_vio"] == 0.0
    assert scalars["router/layer_11/balance_loss"] == pytest.approx(1.0)
    vectors = layer_vectors(layers)
    assert vectors["router/layer_00/load"] == [0.125] * 8
    assert vectors["router/by_layer/z_loss"] == [round(math.log(8) ** 2, 6)] * 12


def test_parts_are_named_when_both_have_tokens() -> None:
    prompt, completion = sums_of([[[3.0, 2.0, 0.0]] * 4], 1), sums_of([[[0.0, 2.0, 3.0]] * 6], 1)
    assert part_scalars({"prompt": prompt, "completion": completion}) == {
        "router/prompt/max_vio_worst": pytest.approx(2.0),
        "router/prompt/tokens": 4,
        "router/completion/max_vio_worst": pytest.approx(2.0),
        "router/completion/tokens": 6,
    }
    assert part_scalars({"prompt": prompt, "completion": sums_of([[[0.0, 1.0, 2.0]]], 1, chosen=[])}) == {}


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 8, 2), (1024, 8, 2), (256, 16, 4), (512, 64, 8)])
def test_the_noise_floor_is_what_uniform_routing_shows(tokens: int, experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shown = []
    for _ in range(200):
        chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        shown.append(int(torch.bincount(chosen.reshape(-1)).max()) * experts / (tokens * top_k) - 1)
    # The mean of 200 has a standard error of about 2%, the formula leaves out the skew of small counts.
    assert noise_floor(tokens, experts, top_k) == pytest.approx(sum(shown) / len(shown), rel=0.08)


def test_the_noise_floor_of_two_of_eight() -> None:
    """2.64 over the square root of the number of tokens."""
    for tokens, want in ((256, 0.165), (1024, 0.082), (4096, 0.041), (16384, 0.021), (65536, 0.010)):
        assert noise_floor(tokens, 8, 2) == pytest.approx(want, rel=0.03)
    assert noise_floor(100, 4, 4) == 0.0


def test_random_repetition_of_two_of_eight_is_the_papers() -> None:
    first, any_ = random_repetition(8, 2)
    assert first == 0.125
    assert any_ == pytest.approx(0.464, abs=5e-4)
    assert random_repetition(4, 3)[1] == 1.0


def test_a_window_that_missed_a_token_is_our_mistake() -> None:
    sums = sums_of([[[0.0, 1.0, 2.0]]], 2)
    with pytest.raises(AssertionError, match="missed tokens"):
        replace(sums, tokens=2)
    empty = sums_of([[[0.0, 1.0]]], 2, chosen=[])
    with pytest.raises(AssertionError, match="no token"):
        layer_metrics(empty)
