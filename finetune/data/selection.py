"""Which rows are trained on: without duplicates, without what is held out, and in the order of a mixture.

Why: a conversation that is repeated is learnt by heart, and one on both sides makes the held-out loss a lie. How: the
key is a hash of roles and texts without regard to white space. Near is the share of five-word runs (shingles) that two
conversations have in common (Jaccard), case and punctuation aside: rows whose 128 minimum hashes agree in one of 25
bands of 5 are compared by all 128, with a standard error of 0.03; the bands miss 1 pair in 20,000 at 0.8. The first of
near ones stays; a row goes only for a row that stays. System messages are no part of a signature, and a script without
spaces counts each character as a word. Rows with equal keys are held out together, in the order of a hash of key and
seed, so more data moves few of them across. Leaves out likeness in meaning, and shuffling.

100,000 conversations of about 400 tokens, one core: 5 s for keys, 17 s for signatures, 3 s to find the near ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets
from rensa import RMinHash

from finetune.data.messages import tools_as_text
from finetune.data.rows import Conversation, Message
from finetune.errors import DataError

NEAR = 0.8
SIGNATURE_VERSION = RMinHash.ALGORITHM_VERSION  # signatures of another version are not comparable
_HASHES, _SEED = 128, 42
_SHINGLE = 5
_BAND = 5  # hashes
_MOST_COMPARED = 1000  # rows that a row is compared with; more agree in a band only where a set shares long phrases
# Thai to Burmese, Khmer, kana, Han: words are not set apart, so each character is one.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")
_BREAK = "\x1f"  # is white space, so no text has one after normalization


def content_key(conversation: Sequence[Message]) -> bytes:
    """16 bytes that are equal for conversations with the same roles, texts, tools and calls, but for white space."""
    parts = [part for m in conversation for part in (m["role"], " ".join(m["content"].split()))]
    parts += [f"{number} {text}" for number, m in enumerate(conversation) if (text := tools_as_text(m))]
    return hashlib.blake2b(_BREAK.join(parts).encode(), digest_size=16).digest()


def shingles(conversation: Conversation) -> list[str]:
    """The runs of five words, all turns but the system's in a row; never none."""
    text = "\n".join(m["content"] + tools_as_text(m) for m in conversation if m["role"] != "system").lower()
    words = _WORD.findall(text) or text.split() or [""]
    if len(words) <= _SHINGLE:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[i:] for i in range(_SHINGLE)), strict=False)))


def signature(conversation: Conversation) -> bytes:
    """The minimum hashes, 512 bytes; about 0.2 ms for 400 tokens."""
    minimum = RMinHash(_HASHES, _SEED)
    minimum.update(shingles(conversation))
    return np.array(minimum.digest(), dtype=np.uint32).tobytes()


def near_duplicates(signatures: Sequence[bytes], threshold: float = NEAR) -> np.ndarray:
    """True for each row that is near an earlier one which stays.

    Args:
        threshold: smallest estimated Jaccard similarity that counts; 0.7 or more, below that the bands miss pairs.
    """
    hashes_NH = _matrix(signatures)
    return _near_kept(hashes_NH, threshold, always_kept=0)


def near_leaks(train: Sequence[bytes], held_out: Sequence[bytes], threshold: float = NEAR) -> np.ndarray:
    """True for each held-out row that is near a row to be trained on; arguments as in `near_duplicates`."""
    distinct = list(dict.fromkeys(train))
    near_N = _near_kept(_matrix([*distinct, *held_out]), threshold, always_kept=len(distinct), keep_more=False)
    return near_N[len(distinct) :]


def leaked(seen: Sequence[bytes], held_out: Sequence[bytes]) -> np.ndarray:
    """True for each held-out key that is among those to be trained on."""
    known = set(seen)
    return np.fromiter((key in known for key in held_out), dtype=bool, count=len(held_out))


def duplicates_of(
    keys: Sequence[bytes],
    positions: np.ndarray,
    signatures: Sequence[bytes] | None = None,
    threshold: float = NEAR,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows whose conversation is equal to an earlier one, and those whose conversation is near one but not equal.

    A long conversation may have become several rows: neighbours with the same key and position are one conversation,
    and stay or go together.

    Args:
        keys, signatures: of the conversation, for each row.
        positions: of the conversation in its source, for each row.

    Returns:
        a mask for equal rows, and one for near rows, or None without signatures.
    """
    assert len(keys) == len(positions), "a position for each row"
    begins = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1] or positions[i] != positions[i - 1]]
    rows_C = np.diff([*begins, len(keys)])
    seen: set[bytes] = set()
    equal_C = np.zeros(len(begins), dtype=bool)
    for number, begin in enumerate(begins):
        equal_C[number] = keys[begin] in seen
        seen.add(keys[begin])
    near = None
    if signatures is not None:
        near_C = np.zeros(len(begins), dtype=bool)
        left = np.flatnonzero(~equal_C)
        near_C[left] = near_duplicates([signatures[begins[i]] for i in left], threshold)
        near = np.repeat(near_C, rows_C)
    return np.repeat(equal_C, rows_C), near


# ---- candidates by bands, checked by all hashes ---------------------------------------------------------------------


def _matrix(signatures: Sequence[bytes]) -> np.ndarray:
    hashes = np.frombuffer(b"".join(signatures), dtype=np.uint32)
    return hashes.reshape(len(signatures), _HASHES)


def _near_kept(hashes_NH: np.ndarray, threshold: float, *, always_kept: int, keep_more: bool = True) -> np.ndarray:
    """True for each row that is near an earlier kept one.

    Args:
        always_kept: so many rows at the beginning are kept without a look.
        keep_more: whether later rows that are near none are kept too.
    """
    assert 0.7 <= threshold <= 1, "the bands are made for thresholds from 0.7"
    near_N = np.zeros(len(hashes_NH), dtype=bool)
    kept_in: dict[int, list[int]] = {}
    for row, buckets in _shared_buckets(hashes_NH):
        if row >= always_kept:
            candidates = _rarest_first([kept_in.get(bucket, []) for bucket in buckets])
            alike = (hashes_NH[candidates] == hashes_NH[row]).mean(axis=1)
            near_N[row] = (alike >= threshold).any()
            if near_N[row] or not keep_more:
                continue
        for bucket in buckets:
            kept_in.setdefault(bucket, []).append(row)
    return near_N


def _rarest_first(groups: list[list[int]]) -> list[int]:
    """Members of the groups, small ones first: what few rows have in common says most."""
    found: dict[int, None] = {}
    for group in sorted(groups, key=len):
        found.update(dict.fromkeys(group[: _MOST_COMPARED - len(found)]))
    return list(found)


def _shared_buckets(hashes_NH: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Each row that agrees with another in a band, in order, with numbers of what it agrees in.

    Most rows of a set agree with none, and cost a place in 25 sorts.
    """
    rows, buckets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for band in range(_HASHES // _BAND):
        value_N = np.zeros(len(hashes_NH), dtype=np.uint64)
        for column in range(band * _BAND, (band + 1) * _BAND):
            value_N = value_N * np.uint64(0x9E3779B97F4A7C15) + hashes_NH[:, column]
        _, bucket_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(count[bucket_N] > 1)
        rows.append(shared)
        buckets.append(bucket_N[shared] + band * len(hashes_NH))
    row_M, bucket_M = np.concatenate(rows), np.concatenate(buckets)
    order = np.argsort(row_M, kind="stable")
    row_M, bucket_M = row_M[order], bucket_M[order]
    suspects, begins = np.unique(row_M, return_index=True)
    for row, of_row in zip(suspects.tolist(), np.split(bucket_M, begins[1:]), strict=False):
        yield row, of_row.tolist()


# ---- what is held out, and mixtures ---------------------------------------------------------------------------------


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
