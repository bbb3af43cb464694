"""The choice of tokens against a slow count by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from finetune.errors import DataError
from finetune.infer.request import Sampling
from finetune.infer.sampler import RowSampling, choose

VOCAB = 12
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def by_hand(logits: torch.Tensor, prompt: list[int], s: Sampling) -> dict[int, float]:
    """The distribution, token by token in float64."""
    values = logits.double().tolist()
    for token in set(prompt):
        values[token] = (
            values[token] / s.repetition_penalty if values[token] > 0 else values[token] * s.repetition_penalty
        )
    p = (torch.tensor(values, dtype=torch.float64) / s.temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])[: s.top_k or None]
    total = sum(p[token] for token in order)
    kept, before = {}, 0.0
    for token in order:
        share = p[token] / total
        if before < s.top_p and share >= s.min_p * p[order[0]] / total:
            kept[token] = share
        before += share
    return {token: share / sum(kept.values()) for token, share in kept.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.7},
    ],
)
def test_frequencies_are_the_distribution(settings: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, "seed": 7, **settings})
    prompt = [int(LOGITS.argmax()), 3]
    draws = 8000
    rows = [RowSampling(sampling, prompt)]
    counts: Counter[int] = Counter()
    for _ in range(draws // 400):
        # 400 rows of one generator: as many draws of one request.
        counts.update(choose(LOGITS.repeat(400, 1), rows * 400).token_T.tolist())
        seen = rows[0].seen(LOGITS[None])
        if seen is not None:
            seen.fill_(False)
            seen[torch.tensor(prompt)] = True
    expected = by_hand(LOGITS, prompt, sampling)
    assert set(counts) <= set(expected)
    for token, share in expected.items():
        # Four standard deviations of a count.
        assert abs(counts[token] / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5 + 1e-9


DRAWS = [0.0, 2**-149, 2**-60, 0.5, 1 - 2**-24, 1 - 2**-25, 1 - 2**-26, 1 - 2**-53]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 4},
        {"top_k": 1},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "temperature": 3.0},
    ],
)
def test_the_least_and_the_largest_draw_stay_among_what_is_kept(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 makes a one of any draw above 1 - 2^-25."""
    generator = torch.Generator().manual_seed(4)
    draws = iter(DRAWS * 100)
    monkeypatch.setattr(RowSampling, "draw", lambda row: next(draws))
    sampling = Sampling(**{"temperature": 1.0, **settings})
    for _ in range(25):
        logits = torch.randn(50, generator=generator) * 3
        logits[torch.randperm(50, generator=generator)[:10]] = -1000.0  # impossible
        possible = {token for token, share in by_hand(logits, [], sampling).items() if share > 0}
        found = choose(logits.repeat(len(DRAWS), 1), [RowSampling(sampling, [])] * len(DRAWS)).token_T.tolist()
        assert set(found) <= possible
        assert found[0] == int(logits.argmax())


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 5e-324}, {"temperature": 1e-40}, {"top_p": 1e-46}, {"top_p": 5e-324}, {"min_p": 1 - 2**-53}],
)
def test_the_least_values_are_greedy(settings: dict[str, Any]) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 50
    sampling = Sampling(**{"temperature": 1.0, **settings})
    chosen = choose(logits, [RowSampling(sampling, [1])] * 40)
    assert torch.equal(chosen.token_T, logits.argmax(-1))
    assert chosen.finite_T.all()


def test_any_top_k_beyond_the_vocabulary_is_all() -> None:
    found = [
        choose(LOGITS.repeat(50, 1), [RowSampling(Sampling(temperature=2.0, top_k=top_k), [])] * 50).token_T.tolist()
        for top_k in (0, VOCAB, 10**400)
    ]
    assert found[0] == found[1] == found[2]
    assert Sampling(max_new_tokens=10**400).max_new_tokens == 10**400


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_named_and_leaves_the_others_alone(bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, :] = bad
    if bad > 0:
        logits[1, 3:] = 0.0
    for settings in ({}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2, "logprobs": 20}):
        alone = choose(LOGITS[None], [RowSampling(Sampling(**settings), [2])])
        chosen = choose(logits, [RowSampling(Sampling(**settings), [2]) for _ in range(3)])
        assert chosen.finite_T.tolist() == [True, False, True]
        assert chosen.token_T[[0, 2]].tolist() == alone.token_T.tolist() * 2
        assert 0 <= chosen.token_T[1] < VOCAB


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    def draw(company: int) -> list[int]:
        row = RowSampling(Sampling(temperature=1.0, seed=5), [1])
        others = [RowSampling(Sampling(temperature=1.0, seed=i), [1]) for i in range(company)]
        return [int(choose(LOGITS.repeat(company + 1, 1), [*others, row]).token_T[-1]) for _ in range(50)]

    assert draw(0) == draw(3)
    assert len(set(draw(0))) > 2


def test_greedy_and_sampled_rows_together_with_logprobs() -> None:
    rows = [
        RowSampling(Sampling(logprobs=3), [1]),
        RowSampling(Sampling(temperature=2.0, top_k=1), [1]),
        RowSampling(Sampling(repetition_penalty=100.0), [int(LOGITS.argmax())]),
    ]
    chosen = choose(LOGITS.repeat(3, 1), rows)
    best = int(LOGITS.argmax())
    assert chosen.token_T.tolist()[:2] == [best, best]
    assert chosen.token_T[2] != best
    assert chosen.logprob_T is not None
    assert chosen.top_ids is not None
    assert chosen.logprob_T[0] == LOGITS.log_softmax(0)[best]
    assert chosen.top_ids[0].tolist() == LOGITS.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "above 0, at most 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"repetition_penalty": 1e-46}, "0.01 to 100"),
        ({"stop": ("",)}, "texts that are not empty"),
        ({"logprobs": 21}, "0 to 20"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_values_outside_their_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        Sampling(**settings)
    assert message in str(caught.value)
