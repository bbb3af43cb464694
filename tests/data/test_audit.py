"""The supervision report against a count by plain loops."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data import audit, require_supervision, supervise
from finetune.errors import DataError

EOS = 2


def counted_by_hand(rows: list[dict[str, list[int]]], max_length: int | None) -> dict[str, Any]:
    counts = dict.fromkeys(("tokens", "supervised_tokens", "supervised_turns", "eos_supervised_turns"), 0)
    counts |= dict.fromkeys(("rows_unsupervised", "rows_truncated", "tokens_truncated", "supervised_tokens_uncut"), 0)
    for row in rows:
        kept = list(zip(row["input_ids"], row["labels"], strict=True))[:max_length]
        learnt = [label != -100 for _, label in kept]
        counts["tokens"] += len(kept)
        counts["supervised_tokens"] += sum(learnt)
        counts["supervised_tokens_uncut"] += sum(label != -100 for label in row["labels"])
        counts["rows_unsupervised"] += not any(learnt)
        counts["rows_truncated"] += len(kept) < len(row["labels"])
        counts["tokens_truncated"] += len(row["labels"]) - len(kept)
        for is_learnt, turn in groupby(kept, key=lambda pair: pair[1] != -100):
            if is_learnt:
                counts["supervised_turns"] += 1
                counts["eos_supervised_turns"] += list(turn)[-1][0] == EOS
    longest = max(len(row["labels"]) for row in rows)
    share = counts["supervised_tokens"] / counts["tokens"]
    return {**counts, "rows": len(rows), "longest": longest, "max_length": max_length, "supervised_share": share}


@pytest.mark.parametrize("max_length", [None, 1, 7, 40, 100, 10_000])
def test_counts_of_real_conversations(
    tokenizer: PreTrainedTokenizerBase, reference_conversations: list[dict[str, Any]], max_length: int | None
) -> None:
    data = supervise(Dataset.from_list([{"messages": row["messages"]} for row in reference_conversations]), tokenizer)
    report = audit(data, eos_token_id=EOS, max_length=max_length)
    assert report.to_dict() == counted_by_hand(data.to_list(), max_length)
    if max_length is None:
        turns = sum(len(row["assistant"]) for row in reference_conversations)
        assert report.supervised_turns == report.eos_supervised_turns == turns


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_random_labels(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(4321):  # more than one batch; empty rows and turns that touch the row's end among them
        ids = [rng.randint(0, 5) for _ in range(rng.choice((0, 1, 2, 3, 17)))]
        rows.append({"input_ids": ids, "labels": [i if rng.random() < 0.5 else -100 for i in ids]})
    data = Dataset.from_list(rows)
    for max_length in (None, 2, 10):
        assert audit(data, eos_token_id=EOS, max_length=max_length).to_dict() == counted_by_hand(rows, max_length)
    chosen = data.select(range(4000, 100, -3))  # an indirection between rows and buffers
    assert audit(chosen, eos_token_id=EOS).to_dict() == counted_by_hand(chosen.to_list(), None)


def test_the_table_says_what_matters() -> None:
    rows = [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}, {"input_ids": [1, 5], "labels": [-100, -100]}]
    table = dict(audit(Dataset.from_list(rows), eos_token_id=EOS, max_length=3).table())
    assert table == {
        "conversations": "2",
        "tokens": "5",
        "supervised tokens": "1 (20.0%)",
        "turns with supervised end": "0 of 1",
        "conversations with nothing supervised": "1",
        "longest conversation": "4 tokens (limit 3)",
        "truncated conversations": "1 (1 tokens lost)",
    }


def test_nothing_supervised_is_refused() -> None:
    report = audit(Dataset.from_list([{"input_ids": [1, 5, 2], "labels": [-100] * 3}] * 2), eos_token_id=EOS)
    with pytest.raises(DataError, match="not one of 6 tokens in 2 conversations is supervised") as caught:
        require_supervision(report, where="my.jsonl")
    assert "my.jsonl" in str(caught.value)
    assert "{% generation %}" in str(caught.value)


def test_nothing_left_after_truncation_is_refused() -> None:
    data = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}])
    with pytest.raises(DataError, match=r"truncation to training\.max_length 2 leaves nothing") as caught:
        require_supervision(audit(data, eos_token_id=EOS, max_length=2))
    assert "the longest conversation has 4 tokens" in str(caught.value)
    require_supervision(audit(data, eos_token_id=EOS, max_length=3))
