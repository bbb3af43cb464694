"""Drift against loops over Python numbers, at identity, and at chance level."""

import math
import random

import pytest
import torch

from finetune.router.drift import Drift, chance_overlap, drift, drift_scalars, drift_sums, drift_vectors


def brute_force(base: list, tuned: list, top_k: int) -> dict[str, list[float]]:
    """The five numbers of every layer from logits [L][N][E], a token at a time."""
    out: dict[str, list[float]] = {name: [] for name in ("overlap", "top1_agreement", "kl", "js_load", "load_change")}
    for base_layer, tuned_layer in zip(base, tuned, strict=True):
        tokens, experts = len(base_layer), len(base_layer[0])
        overlap = agree = 0
        kl = 0.0
        loads = [[0.0] * experts, [0.0] * experts]
        for pair in zip(base_layer, tuned_layer, strict=True):
            probs, chosen = [], []
            for side, logits in enumerate(pair):
                weights = [math.exp(x) for x in logits]
                probs.append([w / sum(weights) for w in weights])
                chosen.append(sorted(range(experts), key=lambda e, logits=logits: -logits[e])[:top_k])
                for expert in chosen[side]:
                    loads[side][expert] += 1 / (tokens * top_k)
            overlap += len(set(chosen[0]) & set(chosen[1]))
            agree += chosen[0][0] == chosen[1][0]
            kl += sum(p * math.log(p / q) for p, q in zip(*probs, strict=True))
        js = 0.0
        for f, g in zip(*loads, strict=True):
            middle = (f + g) / 2
            js += sum(x * math.log(x / middle) / 2 for x in (f, g) if x > 0)
        out["overlap"].append(overlap / (tokens * top_k))
        out["top1_agreement"].append(agree / tokens)
        out["kl"].append(kl / tokens)
        out["js_load"].append(js)
        out["load_change"].append(max(abs(f - g) for f, g in zip(*loads, strict=True)) * experts)
    return out


@pytest.mark.parametrize(("layers", "tokens", "experts", "top_k"), [(3, 40, 8, 2), (2, 17, 6, 3), (1, 1, 4, 1)])
def test_equals_loops_over_python_numbers(layers: int, tokens: int, experts: int, top_k: int) -> None:
    generator = random.Random(layers)
    base = [[[generator.gauss(0, 2) for _ in range(experts)] for _ in range(tokens)] for _ in range(layers)]
    tuned = [[[x + generator.gauss(0, 1) for x in token] for token in layer] for layer in base]
    want = brute_force(base, tuned, top_k)
    as_logits = [torch.tensor(x, dtype=torch.float64) for x in (base, tuned)]
    for inputs in (as_logits, [x.log_softmax(-1) for x in as_logits]):
        got = drift(*inputs, top_k)
        assert got.tokens == tokens
        for name, values in want.items():
            assert vars(got)[name] == pytest.approx(values, rel=1e-10, abs=1e-14), name


def test_sums_over_rows_are_those_of_all_rows_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(3, 50, 8, generator=generator) for _ in range(2))
    total = drift_sums(list(base[:, :20]), list(tuned[:, :20]), 2) + drift_sums(base[:, 20:], tuned[:, 20:], 2)
    whole = drift(base, tuned, 2)
    for name, value in vars(total.drift()).items():
        assert value == pytest.approx(vars(whole)[name], rel=1e-12), name
    assert total.base_load.sum(1).tolist() == pytest.approx([1.0] * 3)
    chosen = tuned.topk(2).indices
    want = [[(chosen[layer] == expert).sum().item() / 100 for expert in range(8)] for layer in range(3)]
    assert torch.allclose(total.tuned_load, torch.tensor(want).double())


def test_a_model_has_not_drifted_from_itself() -> None:
    logits = torch.randn(4, 100, 8, generator=torch.Generator().manual_seed(1))
    same = drift(logits, logits, 2)
    assert same == Drift([1.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, 100)
    # Adding a constant to a token's logits changes no probability.
    shifted = drift(logits, logits.double() + 3.0, 2)
    assert shifted.overlap == [1.0] * 4
    assert max(shifted.kl) < 1e-12


def test_routing_without_memory_scores_chance() -> None:
    generator = torch.Generator().manual_seed(2)
    base, tuned = (torch.randn(1, 20_000, 8, generator=generator) for _ in range(2))
    got = drift(base, tuned, 2)
    assert chance_overlap(8, 2) == 0.25
    # Standard error of the mean of 20,000 overlaps of {0, 1/2, 1}: below 0.0025.
    assert got.overlap[0] == pytest.approx(0.25, abs=0.01)
    assert got.top1_agreement[0] == pytest.approx(1 / 8, abs=0.01)


def test_disjoint_routing_reaches_the_bounds() -> None:
    base, tuned = torch.full((1, 10, 4), -50.0), torch.full((1, 10, 4), -50.0)
    base[..., :2], tuned[..., 2:] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    got = drift(base, tuned, 2)
    assert got.overlap == [0.0]
    assert got.top1_agreement == [0.0]
    assert got.js_load == pytest.approx([math.log(2)])
    assert got.load_change == pytest.approx([2.0])  # from half of the load, twice an even share, to nothing


def test_names_of_what_is_logged() -> None:
    drifted = Drift([0.9, 0.7], [0.8, 0.6], [0.01, 0.03], [0.002, 0.001], [0.1, 0.3], 64)
    assert drift_scalars(drifted) == {
        "router/drift/overlap_mean": pytest.approx(0.8),
        "router/drift/overlap_worst": 0.7,
        "router/drift/top1_agreement_mean": pytest.approx(0.7),
        "router/drift/kl_mean": pytest.approx(0.02),
        "router/drift/kl_worst": 0.03,
        "router/drift/js_load_worst": 0.002,
        "router/drift/load_change_worst": 0.3,
    }
    names = ("overlap", "top1_agreement", "kl", "js_load", "load_change")
    assert drift_vectors(drifted) == {f"router/drift/by_layer/{name}": vars(drifted)[name] for name in names}
