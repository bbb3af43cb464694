"""Confidence intervals of means over tokens, by the bootstrap over conversations.

The tokens of a conversation depend on each other, so it is conversations that are drawn again, with replacement, and
every mean is a ratio of two sums over the drawn ones (percentile intervals: Efron and Tibshirani 1993, chapter 13). All
measures of all models share the same draws, so the interval of a difference is that of paired differences.

Leaves out: corrections for few conversations; below about twenty the intervals are too narrow. A share that is 0 or 1
in every conversation has an interval of no width, whatever their number.

Shape suffixes: N conversations, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
DRAWS = 2000
# Entries of the table of draws that are made at once.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; no ends from a single conversation."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> Estimate:
        """Of exp(value): percentiles keep their order."""
        ends = [None if end is None else float(np.exp(end)) for end in (self.low, self.high)]
        return Estimate(float(np.exp(self.value)), *ends)


class Bootstrap:
    """The draws for `conversations` conversations, the same for every measure."""

    def __init__(self, conversations: int, *, seed: int = 0, draws: int = DRAWS):
        assert conversations > 0, "nothing to draw from"
        self._conversations, self._seed, self._draws = conversations, seed, draws

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
        """sum(numerators) / sum(denominators) with its interval; both have a number for every conversation."""
        sums_N2 = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
        assert sums_N2.shape == (self._conversations, 2), sums_N2.shape
        whole = sums_N2.sum(0)
        value = float(whole[0] / whole[1])
        if self._conversations == 1:
            return Estimate(value, None, None)
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(self._ratios(sums_N2), [tail, 100 - tail])
        return Estimate(value, float(low), float(high))

    def _ratios(self, sums_N2: np.ndarray) -> np.ndarray:
        """[R] ratios, without the draws that a measure has no token in."""
        rng, even = np.random.default_rng(self._seed), np.full(self._conversations, 1 / self._conversations)
        size = max(_AT_ONCE // self._conversations, 1)
        drawn_R2 = np.concatenate(
            [
                rng.multinomial(self._conversations, even, size=min(size, self._draws - begin)) @ sums_N2
                for begin in range(0, self._draws, size)
            ]
        )
        counted = drawn_R2[drawn_R2[:, 1] > 0]
        ratios: np.ndarray = counted[:, 0] / counted[:, 1]
        return ratios
