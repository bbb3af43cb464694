"""Rows that fit: against encoding every run of exchanges and taking the best, with made-up encoders and Mixtral's."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from finetune.data.rows import Conversation, Encoded, Message
from finetune.data.worker import Fitter, Lengths, TooLong

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "finetune" / "data" / "templates" / "mistral_v1.jinja"
TRAIN = ROOT / "recipes" / "tiny-mixtral" / "data" / "train.jsonl"
BOS, EOS = 0, 1

Encode = Callable[[list[Conversation]], list[Encoded]]


def by_characters(conversations: list[Conversation]) -> list[Encoded]:
    """A token for each character, one for each turn's end, and one before everything."""
    return [_by_characters(conversation, merges=False) for conversation in conversations]


def with_merges(conversations: list[Conversation]) -> list[Encoded]:
    """As `by_characters`, but equal neighbours become one token, also across turns: lengths do not add up."""
    return [_by_characters(conversation, merges=True) for conversation in conversations]


def _by_characters(conversation: Conversation, *, merges: bool) -> Encoded:
    ids, supervised = [BOS], [False]
    for message in conversation:
        learnt = message["role"] == "assistant" and message["train"]
        tokens = [*map(ord, message["content"]), *([] if merges and message["role"] != "assistant" else [EOS])]
        for token in tokens:
            if not (merges and ids[-1] == token):
                ids.append(token)
                supervised.append(learnt)
    return Encoded(np.array(ids, np.int32), np.array(supervised))


def message(role: str, content: str, train: bool = True) -> Message:
    return {"role": role, "content": content, "train": train}  # type: ignore[typeddict-item]


def chat(*sizes: int, system: int = 0, open_end: int = 0) -> Conversation:
    """Turns of so many characters, user and assistant in turn."""
    turns = [message(("user", "assistant")[i % 2], "abcdefgh"[i % 8] * size) for i, size in enumerate(sizes)]
    front = [message("system", "s" * system)] if system else []
    return [*front, *turns, *([message("user", "o" * open_end)] if open_end else [])]


def exchanges_of(conversation: Conversation) -> tuple[Conversation, list[Conversation]]:
    """Assumes turns in order: the system message, then pairs."""
    system = [m for m in conversation if m["role"] == "system"]
    turns = conversation[len(system) :]
    return system, [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]


def best_truncation(encode: Encode, conversation: Conversation, max_length: int) -> list[Encoded]:
    system, exchanges = exchanges_of(conversation)
    prefixes = [[*system, *chain.from_iterable(exchanges[:count])] for count in range(1, len(exchanges) + 1)]
    fitting = [row for row in encode(prefixes) if len(row.ids) <= max_length]
    return [row for row in fitting[-1:] if row.supervised.any()]


def best_split(encode: Encode, conversation: Conversation, max_length: int) -> list[Encoded]:
    """Greedy by its definition: one exchange more, as long as it fits."""
    system, exchanges = exchanges_of(conversation)
    rows, begin = [], 0
    while begin < len(exchanges):
        end, row = begin + 1, None
        while end <= len(exchanges):
            [candidate] = encode([[*system, *chain.from_iterable(exchanges[begin:end])]])
            if len(candidate.ids) > max_length:
                break
            end, row = end + 1, candidate
        if row is None:
            begin += 1
            continue
        rows.append(row)
        begin = end - 1
    return [row for row in rows if row.supervised.any()]


def fit(
    conversation: Conversation, max_length: int | None, policy: TooLong, encode: Encode = by_characters
) -> tuple[list[Encoded], Lengths]:
    fitter = Fitter(encode, max_length, policy)
    [rows] = fitter.fit([conversation], encode([conversation]))
    return rows, fitter.lengths


def as_lists(rows: list[Encoded]) -> list[tuple[list[int], list[bool]]]:
    return [(row.ids.tolist(), row.supervised.tolist()) for row in rows]


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    sizes = draw(st.lists(st.integers(0, 12), min_size=2, max_size=12).filter(lambda s: len(s) % 2 == 0))
    made = chat(*sizes, system=draw(st.integers(0, 5)), open_end=draw(st.sampled_from([0, 0, 0, 9])))
    trained = draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made)))
    return [{**m, "train": train or draw(st.booleans())} for m, train in zip(made, trained, strict=True)]


@given(conversations(), st.integers(1, 60))
@settings(max_examples=400, deadline=None)
def test_truncation_is_the_longest_run_of_exchanges(conversation: Conversation, max_length: int) -> None:
    rows, counts = fit(conversation, max_length, "truncate")
    [whole] = by_characters([conversation])
    if len(whole.ids) <= max_length:
        assert as_lists(rows) == as_lists([whole])
        assert counts == Lengths()
        return
    assert as_lists(rows) == as_lists(best_truncation(by_characters, conversation, max_length))
    kept = sum(len(row.ids) for row in rows)
    assert counts == Lengths(1, int(not rows), len(rows), 0, len(whole.ids) - kept)


@given(conversations(), st.integers(1, 60))
@settings(max_examples=400, deadline=None)
def test_split_is_greedy_and_loses_only_what_does_not_fit(conversation: Conversation, max_length: int) -> None:
    rows, counts = fit(conversation, max_length, "split")
    [whole] = by_characters([conversation])
    if len(whole.ids) <= max_length:
        assert as_lists(rows) == as_lists([whole])
        return
    assert as_lists(rows) == as_lists(best_split(by_characters, conversation, max_length))
    system = sum(len(m["content"]) + 1 for m in conversation if m["role"] == "system")
    kept = sum(len(row.ids) - 1 - system for row in rows)  # without what every row has
    assert counts.tokens_lost == (len(whole.ids) - 1 - system - kept if rows else len(whole.ids))
    assert (counts.dropped, counts.truncated, counts.split) == (not rows, len(rows) == 1, len(rows) > 1)


@pytest.mark.parametrize("policy", ["truncate", "split"])
@given(conversation=conversations(), max_length=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_lengths_that_do_not_add_up_are_found_out(policy: TooLong, conversation: Conversation, max_length: int) -> None:
    rows, _ = fit(conversation, max_length, policy, with_merges)
    allowed = set()
    system, exchanges = exchanges_of(conversation)
    for begin in range(len(exchanges)):
        for end in range(begin + 1, len(exchanges) + 1):
            [row] = with_merges([[*system, *chain.from_iterable(exchanges[begin:end])]])
            allowed.add(tuple(row.ids.tolist()))
    allowed.add(tuple(with_merges([conversation])[0].ids.tolist()))
    for row in rows:
        assert len(row.ids) <= max_length
        assert tuple(row.ids.tolist()) in allowed


def test_cut_keeps_the_first_tokens_as_trl_does() -> None:
    conversation = chat(3, 4, 3, 4)
    [whole] = by_characters([conversation])
    rows, counts = fit(conversation, 11, "cut")
    assert as_lists(rows) == [(whole.ids[:11].tolist(), whole.supervised[:11].tolist())]
    assert counts == Lengths(rows=1, truncated=1, tokens_lost=len(whole.ids) - 11)


def test_a_row_that_would_teach_nothing_is_dropped() -> None:
    assert fit(chat(30, 4), 11, "cut") == ([], Lengths(rows=1, dropped=1, tokens_lost=37))
    prompt = [message("user", "u" * 5), message("assistant", "a" * 5, train=False)]
    rows, counts = fit([*prompt, *chat(5, 5)], 15, "truncate")
    assert (rows, counts.dropped) == ([], 1)
    rows, counts = fit([*prompt, *chat(5, 5)], 15, "split")  # the second exchange alone
    assert [len(row.ids) for row in rows] == [13]
    assert counts == Lengths(rows=1, truncated=1, tokens_lost=12)


def test_drop_and_no_limit() -> None:
    assert fit(chat(3, 4, 3, 4), 11, "drop") == ([], Lengths(rows=1, dropped=1, tokens_lost=19))
    conversation = chat(100, 100)
    rows, counts = fit(conversation, None, "drop")
    assert as_lists(rows) == as_lists(by_characters([conversation]))
    assert counts == Lengths()


def test_an_open_question_at_the_end_is_left_out_first() -> None:
    conversation = chat(3, 4, 3, 4, open_end=10)
    [answered] = by_characters([conversation[:-1]])
    for policy in ("truncate", "split"):
        rows, counts = fit(conversation, len(answered.ids), policy)
        assert as_lists(rows) == as_lists([answered])
        assert counts == Lengths(rows=1, truncated=1, tokens_lost=11)


def test_only_long_conversations_are_encoded_again_and_little() -> None:
    encoded_tokens = 0

    def counting(batch: list[Conversation]) -> list[Encoded]:
        nonlocal encoded_tokens
        rows = by_characters(batch)
        encoded_tokens += sum(len(row.ids) for row in rows)
        return rows

    short, long = chat(4, 4), chat(*[20, 50] * 200)
    encoded = by_characters([short] * 50 + [long])
    fitter = Fitter(counting, 1000, "truncate")
    fitter.fit([short] * 50 + [long], encoded)
    assert fitter.lengths.rows == 1
    assert encoded_tokens <= 3 * 1000
    encoded_tokens = 0
    fitter = Fitter(counting, 1000, "split")
    fitter.fit([long], by_characters([long]))
    assert encoded_tokens <= 2.2 * len(encoded[-1].ids)


def test_counts_add_up_over_chunks() -> None:
    one, two = Lengths(1, 0, 1, 0, 7), Lengths(2, 1, 0, 1, 5)
    assert one + two == Lengths(3, 1, 1, 1, 12)
    assert sum([one, two], Lengths()) == Lengths(3, 1, 1, 1, 12)
    assert Fitter(by_characters, 5, "drop").lengths == Lengths()


# ---- Mixtral's tokenizer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tokenizer: PreTrainedTokenizerBase) -> Encode:
    template = TEMPLATE.read_text(encoding="utf-8")

    def encode(batch: list[Conversation]) -> list[Encoded]:
        made = tokenizer.apply_chat_template(
            batch, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        return [
            Encoded(np.array(ids, np.int32), np.array(mask, bool))
            for ids, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]

    return encode


@pytest.fixture(scope="module")
def bundled() -> list[Conversation]:
    """Conversations of 1 to 12 exchanges, a third of them with a system message, joined from the bundled ones."""
    rows = [json.loads(line)["messages"] for line in TRAIN.read_text(encoding="utf-8").splitlines()[:300]]
    rows = [[m for m in row if m["role"] != "system"] for row in rows]
    made: list[Conversation] = []
    begin = 0
    for i in range(60):
        count = 1 + i % 12
        turns = [message(m["role"], m["content"]) for row in rows[begin : begin + count] for m in row]
        begin = (begin + count) % (len(rows) - 12)
        made.append([*([message("system", "Answer in one sentence.")] if i % 3 == 0 else []), *turns])
    return made


@pytest.mark.parametrize("max_length", [24, 60, 150])
def test_with_the_mixtral_tokenizer(mixtral: Encode, bundled: list[Conversation], max_length: int) -> None:
    encoded = mixtral(bundled)
    for policy, brute_force in (("truncate", best_truncation), ("split", best_split)):
        fitter = Fitter(mixtral, max_length, policy)  # type: ignore[arg-type]
        for conversation, whole, rows in zip(bundled, encoded, fitter.fit(bundled, encoded), strict=True):
            if len(whole.ids) <= max_length:
                assert rows == [whole]
            else:
                assert as_lists(rows) == as_lists(brute_force(mixtral, conversation, max_length))
        assert fitter.lengths.rows == sum(len(whole.ids) > max_length for whole in encoded)
        assert fitter.lengths.rows == fitter.lengths.dropped + fitter.lengths.truncated + fitter.lengths.split
