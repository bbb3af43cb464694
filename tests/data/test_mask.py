"""Labels against the spans of mistral-common, in one process and in two."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


from finetune.data.mask import IGNORED, supervise
from finetune.errors import DataError


@pytest.fixture
def conversations(reference_conversations: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"], "origin": "fixture"} for row in reference_conversations])


@pytest.mark.parametrize("num_proc", [None, 2])
def test_labels_are_the_assistants_tokens_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Dataset,
    reference_conversations: list[dict[str, Any]],
    num_proc: int | None,
) -> None:
    supervised = supervise(conversations, tokenizer, num_proc=num_proc)
    assert supervised.column_names == ["input_ids", "labels"]
    assert len(supervised) == len(reference_conversations)
    for row, truth in zip(supervised, reference_conversations, strict=True):
        expected = [IGNORED] * len(truth["ids"])
        for start, end in truth["assistant"]:
            expected[start:end] = truth["ids"][start:end]
        assert row["input_ids"] == truth["ids"]
        assert row["labels"] == expected


def test_every_end_of_an_assistant_turn_is_supervised_and_no_prompt_is(
    tokenizer: PreTrainedTokenizerBase, conversations: Dataset, reference_conversations: list[dict[str, Any]]
) -> None:
    for row, truth in zip(supervise(conversations, tokenizer), reference_conversations, strict=True):
        learnt = [label for label in row["labels"] if label != IGNORED]
        assert learnt.count(tokenizer.eos_token_id) == len(truth["assistant"])
        assert tokenizer.bos_token_id not in learnt
        said = [m["content"].replace("▁", " ") for m in truth["messages"] if m["role"] == "assistant"]
        ends = [i for i, token in enumerate(learnt) if token == tokenizer.eos_token_id]
        turns = [learnt[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
        assert [tokenizer.decode(turn) for turn in turns] == said


def test_a_long_conversation_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "word " * 40_000}]
    [row] = supervise(Dataset.from_list([{"messages": messages}]), tokenizer)
    assert len(row["input_ids"]) > tokenizer.model_max_length
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_refused_conversation_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = Dataset.from_list([{"messages": messages} for messages in (good, good, good[1:], good)])
    with pytest.raises(DataError, match="refuses a conversation: message 1 has role assistant") as caught:
        supervise(data, tokenizer)
    assert "row 3 of the data set" in str(caught.value)
