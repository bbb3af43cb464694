"""Which rows are held out, and in which order several sets are trained on.

Why: a held-out conversation that is also trained on measures memory, and a split that changes from run to run compares
nothing. How: rows with equal keys are one group and stay together; groups are taken in the order of a hash of key and
seed, so a group's place does not depend on where its rows stand, and more data moves few groups across. Sets are
interleaved by `datasets.interleave_datasets`, which draws a source for each row, and takes its rows in order.

Leaves out near duplicates, which may end up on both sides (`duplicates.near_leaks` finds them), and shuffling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

from finetune.errors import DataError

Stopping = Literal["all_exhausted", "first_exhausted"]


def hold_out(
    keys: Sequence[bytes], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws rows to hold out.

    Args:
        keys: equal for rows that must be on the same side.
        fraction, count: how much is held out, of the rows; one of the two.

    Returns:
        indices to train on and indices held out, each ascending and none empty. Groups of one row make the count exact;
        without them it is missed by at most half of the smallest group that could have gone to the other side.

    Raises:
        DataError: nothing would be left on a side.
    """
    assert (fraction is None) != (count is None), "a fraction or a count"
    wanted = count if count is not None else max(round((fraction or 0.0) * len(keys)), 1)
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    salt = seed.to_bytes(8, "little", signed=True)
    ordered = sorted(groups, key=lambda key: hashlib.blake2b(key, digest_size=8, salt=salt).digest())

    held, left, missing = [], [], wanted
    for key in ordered:
        if len(groups[key]) <= missing:
            held.append(key)
            missing -= len(groups[key])
        else:
            left.append(key)
    if len(groups) < 2 or not left:
        raise _too_few(len(keys), len(groups), wanted)
    if len(left) > 1:
        smallest = min(left, key=lambda key: len(groups[key]))
        if not held or len(groups[smallest]) - missing < missing:  # too many, rather than none or many too few
            held.append(smallest)
            left.remove(smallest)
    return _indices(groups, left), _indices(groups, held)


def interleave(
    sets: Sequence[Dataset],
    weights: Sequence[float] | None = None,
    *,
    seed: int,
    stopping_strategy: Stopping = "all_exhausted",
) -> Dataset:
    """One set of several with the same columns; nothing is copied.

    Args:
        weights: how often a row is drawn from each set, relative to the others; None puts one after the other.
        stopping_strategy: ends when each set has been seen whole, small ones again and again, or when the first has.
    """
    assert sets, "nothing to mix"
    if len(sets) == 1:
        return sets[0]
    if weights is None:
        return concatenate_datasets(list(sets))
    assert len(weights) == len(sets), "a weight for each set"
    total = sum(weights)
    return interleave_datasets(
        list(sets),
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy=stopping_strategy,
    )


def _indices(groups: dict[bytes, list[int]], keys: list[bytes]) -> np.ndarray:
    return np.sort(np.array([index for key in keys for index in groups[key]], dtype=np.int64))


def _too_few(rows: int, distinct: int, wanted: int) -> DataError:
    return DataError(
        f"holding out {wanted} of {rows} rows, of which {distinct} are different, leaves nothing on one side",
        where="data.eval_fraction or data.eval_rows",
        allowed="at least one row to train on and one to hold out; equal conversations stay on the same side",
        fix="hold out fewer, or name held-out conversations in data.eval",
    )
