"""Favourite tokens and pairs of experts against loops over Python numbers."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch

from finetune.router.study.choices import Choices


def random_choices(layers: int, experts: int, top_k: int, seed: int = 0) -> tuple[list, list]:
    """Rows of token ids, and of each row the chosen experts [layer][token][k]; token 7 prefers expert 0."""
    generator = random.Random(seed)
    rows = [[generator.randrange(5, 12) for _ in range(generator.randrange(3, 40))] for _ in range(12)]
    chosen = [
        [
            [
                ([0] + generator.sample(range(1, experts), top_k - 1))
                if token == 7 and generator.random() < 0.9
                else generator.sample(range(experts), top_k)
                for token in row
            ]
            for _ in range(layers)
        ]
        for row in rows
    ]
    return rows, chosen


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 3), (4, 1)])
def test_equals_loops_over_python_numbers(experts: int, top_k: int) -> None:
    layers, least = 2, 20
    rows, chosen = random_choices(layers, experts, top_k)
    counted = Choices(rows, layers=layers, experts=experts, min_count=least)
    for row, of_layers in zip(rows, chosen, strict=True):
        counted.add(row, [torch.tensor(layer) for layer in of_layers])
    tokens = sum(map(len, rows))
    lifts, favourites = counted.coactivation_lift(), counted.favourites(top=100)
    for layer in range(layers):
        pairs = [
            (token, set(experts_of))
            for row, of_layers in zip(rows, chosen, strict=True)
            for token, experts_of in zip(row, of_layers[layer], strict=True)
        ]
        takes = [sum(e in experts_of for _, experts_of in pairs) for e in range(experts)]
        for i in range(experts):
            assert counted.pairs_LEE[layer, i, i] == takes[i]
            assert math.isnan(lifts[layer, i, i])
        for i, j in combinations(range(experts), 2):
            both = sum({i, j} <= experts_of for _, experts_of in pairs)
            assert counted.pairs_LEE[layer, i, j] == counted.pairs_LEE[layer, j, i] == both
            if top_k > 1:
                chance = takes[i] / tokens * takes[j] / tokens * (top_k - 1) / top_k * experts / (experts - 1)
                assert lifts[layer, i, j].item() == pytest.approx(both / tokens / chance)
        for expert in range(experts):
            want = {}
            for token in {token for row in rows for token in row}:
                occurs = sum(t == token for t, _ in pairs)
                taken = sum(t == token and expert in experts_of for t, experts_of in pairs)
                lift = taken / occurs / (takes[expert] / tokens)
                if occurs >= least and lift > 1:
                    want[token] = (taken, taken / occurs, lift)
            got = favourites[layer][expert]
            assert {f.token: (f.count, f.share, f.lift) for f in got} == {
                token: pytest.approx(numbers) for token, numbers in want.items()
            }
            assert [f.lift for f in got] == sorted((f.lift for f in got), reverse=True)
        assert favourites[layer][0][0].token == 7


def test_uniform_choices_without_repetition_have_lift_one() -> None:
    pairs = list(combinations(range(8), 2))
    counted = Choices([[1] * len(pairs)], layers=1, experts=8)
    counted.add([1] * len(pairs), [torch.tensor(pairs)])
    off_diagonal = ~torch.eye(8, dtype=torch.bool)
    assert torch.allclose(counted.coactivation_lift()[0][off_diagonal], torch.ones(56).double())


def test_an_expert_that_nothing_went_to_has_neither_favourites_nor_pairs() -> None:
    counted = Choices([[3] * 20], layers=1, experts=4, min_count=1)
    counted.add([3] * 20, [torch.tensor([[0, 1]] * 20)])
    assert counted.favourites() == [[[], [], [], []]]  # expert 0 takes token 3 exactly as often as any token
    assert counted.coactivation_lift()[0, 2].isnan().all()
