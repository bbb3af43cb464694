"""Duplicates against brute force, and what is held out and mixed."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.rows import Conversation
from finetune.data.selection import (
    content_key,
    duplicates_of,
    hold_out,
    interleave,
    leaked,
    near_duplicates,
    near_leaks,
    shingles,
    signature,
)
from finetune.errors import DataError

DATA = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "data"


def chat(*texts: str, system: str | None = None) -> Conversation:
    front: Conversation = [] if system is None else [{"role": "system", "content": system, "train": True}]
    roles = ("user", "assistant") * len(texts)
    return [*front, *({"role": r, "content": t, "train": True} for r, t in zip(roles, texts, strict=False))]  # type: ignore[list-item]


def runs(conversation: Conversation) -> set[tuple[str, ...]]:
    """Five words at a time; the texts below are of plain letters, digits and spaces."""
    words = " ".join(m["content"] for m in conversation if m["role"] != "system").lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def jaccard(one: set[tuple[str, ...]], two: set[tuple[str, ...]]) -> float:
    return len(one & two) / len(one | two)


@pytest.fixture(scope="module")
def edited() -> list[Conversation]:
    """500 conversations of 40 to 300 words in families: one and up to five copies of it with more and more words
    changed."""
    draw = random.Random(1)
    vocabulary = [f"word{i}" for i in range(2000)]
    made: list[Conversation] = []
    while len(made) < 500:
        words = draw.choices(vocabulary, k=draw.randint(40, 300))
        made.append(chat(" ".join(words[:20]), " ".join(words[20:])))
        for _ in range(draw.randint(0, 5)):
            changed = [draw.choice(vocabulary) if draw.random() < 0.02 else word for word in words]
            if draw.random() < 0.3:
                changed = changed + draw.choices(vocabulary, k=len(words) // 5)
            made.append(chat(" ".join(changed[:20]), " ".join(changed[20:])))
            words = changed if draw.random() < 0.5 else words
    draw.shuffle(made)
    return made[:500]


@pytest.fixture(scope="module")
def similarity(edited: list[Conversation]) -> np.ndarray:
    found = np.zeros((len(edited), len(edited)))
    sets = [runs(conversation) for conversation in edited]
    for i, j in combinations(range(len(edited)), 2):
        found[i, j] = found[j, i] = jaccard(sets[i], sets[j])
    return found


def test_key_is_equal_for_equal_texts_only() -> None:
    base = chat("How are you?", "Fine.")
    assert len(content_key(base)) == 16
    assert content_key(chat("How  are\nyou? ", "\tFine.")) == content_key(base)
    others = [
        chat("how are you?", "Fine."),
        chat("How are you? Fine."),
        chat("How are you?", "Fine.", system=""),
        chat("Howare you?", "Fine."),
        chat("How are you?", ""),
        chat("How are you?"),
        chat("How are you?\x1fassistant\x1fFine."),
    ]
    keys = {content_key(conversation) for conversation in others}
    assert len(keys) == len(others)
    assert content_key(base) not in keys


def test_signature_estimates_jaccard(edited: list[Conversation], similarity: np.ndarray) -> None:
    hashes = np.stack([np.frombuffer(signature(c), np.uint32) for c in edited])
    assert hashes.shape == (500, 128)
    related = np.argwhere(np.triu(similarity > 0.1))
    errors = np.array([(hashes[i] == hashes[j]).mean() - similarity[i, j] for i, j in related])
    assert len(errors) > 300
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 0.045  # MinHash of 128: sqrt(J(1-J)/128) is 0.044 at most
    assert signature(edited[0]) == signature(list(edited[0]))


def test_near_duplicates_against_exact_jaccard_of_all_pairs(edited: list[Conversation], similarity: np.ndarray) -> None:
    removed = near_duplicates([signature(c) for c in edited])
    kept = np.flatnonzero(~removed)
    assert 100 < removed.sum() < 400
    to_kept = np.array([similarity[i, kept[kept < i]].max(initial=0) for i in range(len(edited))])
    # Three standard errors (0.035 at 0.8) on both sides; between them the estimate decides.
    assert (to_kept[removed] > 0.7).all()
    assert (to_kept[~removed] < 0.9).all()
    precision = (to_kept[removed] >= 0.8).mean()
    recall = removed[to_kept >= 0.8].mean()
    assert precision > 0.9
    assert recall > 0.9


def test_the_bands_lose_nothing_that_the_estimate_would_find(edited: list[Conversation]) -> None:
    signatures = [signature(c) for c in edited]
    hashes = np.stack([np.frombuffer(s, np.uint32) for s in signatures])
    expected = np.zeros(len(edited), dtype=bool)
    for i in range(1, len(edited)):
        earlier = np.flatnonzero(~expected[:i])
        expected[i] = ((hashes[earlier] == hashes[i]).mean(axis=1) >= 0.8).any()
    assert near_duplicates(signatures).tolist() == expected.tolist()


def test_near_rows_are_found_in_a_set_that_shares_a_long_phrase() -> None:
    draw = random.Random(3)
    phrase = " ".join(f"phrase{i}" for i in range(60))
    texts = [" ".join(draw.choices([f"w{i}" for i in range(500)], k=60)) for _ in range(2500)]
    rows = [chat(f"{phrase} {text}", text[:30]) for text in texts]
    repeated = [chat(f"{phrase} {text} indeed", text[:30]) for text in texts[:200]]
    alike = jaccard(runs(rows[0]), runs(rows[-1]))
    assert 0.25 < alike < 0.35
    removed = near_duplicates([signature(c) for c in rows + repeated])
    assert removed[:2500].sum() == 0
    assert removed[2500:].all()


def test_a_chain_of_likenesses_is_not_removed_from_end_to_end() -> None:
    words = [f"w{i}" for i in range(400)]
    chain = [chat(" ".join(words[start : start + 200])) for start in range(0, 160, 20)]
    neighbours = [jaccard(runs(a), runs(b)) for a, b in pairwise(chain)]
    assert all(0.8 < likeness < 0.85 for likeness in neighbours)
    removed = near_duplicates([signature(c) for c in chain], threshold=0.75)
    kept = [c for c, gone in zip(chain, removed, strict=True) if not gone]
    assert not removed[0]
    assert 2 < len(kept) < len(chain)


def test_leaks_are_those_of_the_training_side_only(edited: list[Conversation], similarity: np.ndarray) -> None:
    signatures = [signature(c) for c in edited]
    found = near_leaks(signatures[:300] * 2, signatures[300:])
    nearest = similarity[300:, :300].max(axis=1)
    assert found[nearest > 0.9].all()
    assert not found[nearest < 0.7].any()
    assert 20 < found.sum() < 180
    # A pair within the held-out rows is no leak.
    assert near_leaks([signature(chat("something else entirely, and long enough"))], signatures[:1] * 2).sum() == 0
    assert near_leaks([], signatures[:2]).tolist() == [False, False]
    assert near_leaks(signatures[:2], []).tolist() == []


def test_leaked_keys() -> None:
    train = [content_key(chat(t)) for t in "abc"]
    assert leaked(train, [content_key(chat(t)) for t in "xbcb"]).tolist() == [False, True, True, True]
    assert leaked([], train).tolist() == [False] * 3


def test_rows_of_one_conversation_stay_or_go_together() -> None:
    long = " ".join(f"w{i}" for i in range(100))
    a, b, near_b = chat("a"), chat(long), chat(long + " and more")
    rows = [(a, 1), (b, 2), (b, 2), (b, 3), (b, 3), (near_b, 4), (near_b, 4), (a, 5), (a, 6)]
    keys, positions = [content_key(c) for c, _ in rows], np.array([p for _, p in rows])
    equal, near = duplicates_of(keys, positions, [signature(c) for c, _ in rows])
    assert equal.tolist() == [False, False, False, True, True, False, False, True, True]
    assert near is not None
    assert near.tolist() == [False] * 5 + [True, True] + [False] * 2
    equal, near = duplicates_of(keys, positions)
    assert equal.sum() == 4
    assert near is None
    assert [len(mask) for mask in duplicates_of([], np.array([]), []) if mask is not None] == [0, 0]


@pytest.mark.parametrize(
    ("one", "two", "alike"),
    [
        (chat("Hello, World! How are you today?"), chat("hello world how are you today"), True),
        (chat("one two three four five six", system="long " * 500), chat("a b c d e f", system="long " * 500), False),
        (chat("你好,今天天气怎么样?我想出去走走。"), chat("你好，今天天气怎么样？我想出去走走！"), True),
        (chat("你好,今天天气怎么样?我想出去走走。"), chat("请把这段话翻译成英文,谢谢你的帮助。"), False),
        (chat("😀 😀"), chat("😀 😀"), True),
        (chat("😀"), chat("😡"), False),
        (chat("", ""), chat("yes", "no"), False),
        (chat("2 + 2"), chat("2 + 3"), False),
    ],
)
def test_what_a_word_is(one: Conversation, two: Conversation, alike: bool) -> None:
    assert near_duplicates([signature(one), signature(two)]).tolist() == [False, alike]


def test_shingles_of_the_bundled_set_are_runs_of_words() -> None:
    rows = [json.loads(line)["messages"] for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[:200]:
        made = shingles(row)
        assert made
        if len(made) > 1:
            assert all(len(shingle.split(" ")) == 5 for shingle in made)
            assert all(a.split(" ")[1:] == b.split(" ")[:4] for a, b in pairwise(made))


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
