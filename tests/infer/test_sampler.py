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
