"""Intervals against a bootstrap written as a loop, with numpy's other generator and draws of its own."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluate.intervals import Bootstrap


def conversations(number: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses, skewed, and tokens, of `number` conversations of very different lengths."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(1, 60, number)
    return rng.gamma(1.0, 2.0, number) * tokens, tokens


def test_the_interval_is_that_of_a_loop_over_draws() -> None:
    losses, tokens = conversations()
    other = np.random.RandomState(3)
    means = []
    for _ in range(3000):
        drawn = [other.randint(len(tokens)) for _ in tokens]
        means.append(sum(losses[i] for i in drawn) / sum(tokens[i] for i in drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    found = Bootstrap(len(tokens)).ratio(losses, tokens)
    assert found.value == pytest.approx(losses.sum() / tokens.sum(), rel=1e-12)
    assert found.low is not None
    assert found.high is not None
    # Of 2000 draws an end has a standard error of about 3% of the width.
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))
    assert found.exp().high == pytest.approx(np.exp(found.high))


def test_draws_are_seeded_and_shared_by_all_measures() -> None:
    losses, tokens = conversations()
    bootstrap = Bootstrap(len(tokens), seed=1)
    assert bootstrap.ratio(losses, tokens) == Bootstrap(len(tokens), seed=1).ratio(losses, tokens)
    assert bootstrap.ratio(losses, tokens).low != Bootstrap(len(tokens), seed=2).ratio(losses, tokens).low
    # A model that is worse by the same 0.25 nats everywhere: paired, the difference is certain.
    one, other = bootstrap.ratio(losses, tokens), bootstrap.ratio(losses + 0.25 * tokens, tokens)
    assert one.low is not None
    assert other.low is not None
    assert other.low - one.low == pytest.approx(0.25)
    difference = bootstrap.ratio(0.25 * tokens, tokens)
    assert (difference.low, difference.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_a_single_conversation_has_no_interval() -> None:
    found = Bootstrap(1).ratio([6.0], [3])
    assert (found.value, found.low, found.high) == (2.0, None, None)
    assert found.exp().low is None


def test_draws_without_a_token_are_left_out() -> None:
    found = Bootstrap(2).ratio([3.0, 0.0], [3, 0])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_many_conversations_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, tokens = conversations()
    whole = Bootstrap(len(tokens)).ratio(losses, tokens)
    monkeypatch.setattr("finetune.evaluate.intervals._AT_ONCE", 40 * 300)
    assert Bootstrap(len(tokens)).ratio(losses, tokens) == whole
