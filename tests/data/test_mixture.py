"""Splits and mixtures: by counting, and against what a mixture of known sets must hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.selection import hold_out, interleave
from finetune.errors import DataError


def keys_of(numbers: list[int]) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=500, deadline=None)
def test_every_row_is_on_one_side_and_equal_ones_on_the_same(numbers: list[int], count: int, seed: int) -> None:
    keys = keys_of(numbers)
    try:
        train, held_out = hold_out(keys, count=count, seed=seed)
    except DataError:
        assert len(set(numbers)) == 1 or count >= len(numbers)
        return
    assert sorted([*train, *held_out]) == list(range(len(keys)))
    assert train.dtype == held_out.dtype == np.int64
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    sides = [{numbers[i] for i in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    sizes = Counter(numbers)
    missed = len(held_out) - count
    if missed < 0 and len(sides[0]) > 1:
        assert -missed <= min(sizes[number] for number in sides[0]) / 2
    elif missed > 0 and len(sides[1]) > 1:
        assert missed <= max(sizes[number] for number in sides[1]) / 2
    again = hold_out(keys, count=count, seed=seed)
    assert again[0].tolist() == train.tolist()


def test_counts_and_fractions_are_exact_without_duplicates() -> None:
    keys = keys_of(list(range(1000)))
    for count in (1, 7, 500, 999):
        assert [len(side) for side in hold_out(keys, count=count, seed=0)] == [1000 - count, count]
    assert len(hold_out(keys, fraction=0.05, seed=0)[1]) == 50
    assert len(hold_out(keys[:10], fraction=0.001, seed=0)[1]) == 1


def test_single_rows_make_up_what_groups_miss() -> None:
    keys = keys_of([i // 7 for i in range(70)] + list(range(100, 120)))
    for count in range(1, 60):
        assert len(hold_out(keys, count=count, seed=3)[1]) == count


def test_groups_of_one_size_come_as_near_as_they_can() -> None:
    keys = keys_of([i // 3 for i in range(30)])
    assert [len(hold_out(keys, count=count, seed=0)[1]) for count in (3, 4, 5, 6)] == [3, 3, 6, 6]
    assert len(hold_out(keys, count=2, seed=0)[1]) == 3


def test_the_split_goes_by_content_and_seed() -> None:
    numbers = np.arange(300)
    shuffled = np.random.default_rng(0).permutation(numbers)
    [_, held_out] = hold_out(keys_of(numbers.tolist()), count=30, seed=5)
    [_, of_shuffled] = hold_out(keys_of(shuffled.tolist()), count=30, seed=5)
    assert set(shuffled[of_shuffled]) == set(held_out)
    [_, other] = hold_out(keys_of(numbers.tolist()), count=30, seed=6)
    assert len(set(other) & set(held_out)) < 15
    # A tenth more data moves few rows from one side to the other.
    [_, of_more] = hold_out(keys_of(list(range(330))), count=33, seed=5)
    assert len(set(held_out) - set(of_more)) <= 10
    # Every row is as likely to be held out as any other.
    drawn = np.bincount(np.concatenate([hold_out(keys_of(list(range(20))), count=5, seed=s)[1] for s in range(2000)]))
    assert drawn.min() > 400
    assert drawn.max() < 600


@pytest.mark.parametrize(("numbers", "count"), [([1, 1, 1], 1), ([1, 2, 3], 3), ([1, 2, 3], 10), ([4], 1)])
def test_a_side_without_rows_is_a_users_mistake(numbers: list[int], count: int) -> None:
    with pytest.raises(DataError) as caught:
        hold_out(keys_of(numbers), count=count, seed=0)
    text = str(caught.value)
    assert f"holding out {count} of {len(numbers)} rows, of which {len(set(numbers))} are different" in text
    assert "data.eval_fraction or data.eval_rows" in text
    assert "fix: hold out fewer" in text


@pytest.fixture
def sets(tmp_path: Path) -> list[Dataset]:
    """Three memory-mapped sets of 1,000, 200 and 50 rows; a row says where it is from."""
    made = []
    for source, rows in enumerate((1000, 200, 50)):
        Dataset.from_dict({"source": [source] * rows, "index": list(range(rows))}).save_to_disk(tmp_path / str(source))
        made.append(Dataset.load_from_disk(tmp_path / str(source)))
    return made


def test_without_weights_one_after_the_other(sets: list[Dataset]) -> None:
    mixed = interleave(sets, seed=0)
    assert list(zip(mixed["source"], mixed["index"], strict=True)) == [
        (source, index) for source, rows in enumerate((1000, 200, 50)) for index in range(rows)
    ]
    assert interleave(sets[:1], [3.0], seed=0) is sets[0]


def test_all_exhausted_sees_every_row_and_draws_by_weight(sets: list[Dataset]) -> None:
    mixed = interleave(sets, [2.0, 1.0, 1.0], seed=1)
    source, index = np.array(mixed["source"]), np.array(mixed["index"])
    for number, rows in enumerate((1000, 200, 50)):
        of_source = index[source == number]
        assert set(of_source) == set(range(rows))
        assert of_source.tolist() == [i % rows for i in range(len(of_source))]  # in order, from the start again
    share = np.bincount(source) / len(source)
    assert np.allclose(share, [0.5, 0.25, 0.25], atol=3 * np.sqrt(0.25 / len(source)))
    assert (source == 0).sum() == 1000  # the last set to be seen whole ends it


def test_first_exhausted_ends_with_the_first_set(sets: list[Dataset]) -> None:
    mixed = interleave(sets, [1, 1, 1], seed=1, stopping_strategy="first_exhausted")
    counts = np.bincount(mixed["source"])
    assert counts.tolist()[2] in (49, 50)
    assert (counts[:2] < 90).all()


def test_a_mixture_is_reproducible_and_stays_on_the_disk(sets: list[Dataset]) -> None:
    one, two, other = (interleave(sets, [3, 2, 1], seed=seed) for seed in (7, 7, 8))
    assert one["source"] == two["source"]
    assert one["source"] != other["source"]
    assert {file["filename"] for file in one.cache_files} >= {sets[0].cache_files[0]["filename"]}
