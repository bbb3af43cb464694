"""Labels of whole files against the spans of mistral-common, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data.rows import IGNORED

Label = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def truths(reference_conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with something to learn: a conversation of empty answers is refused before it is encoded."""
    said = [
        row
        for row in reference_conversations
        if any(m["role"] == "assistant" and m["content"].strip() for m in row["messages"])
    ]
    assert len(said) > 300
    return said


@pytest.mark.parametrize("processes", [1, 2])
def test_labels_are_the_assistants_tokens_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase, labelled: Label, truths: list[dict[str, Any]], processes: int
) -> None:
    rows = labelled([truth["messages"] for truth in truths] * 4, tokenizer, processes=processes)
    for row, truth in zip(rows, truths * 4, strict=True):
        expected = [IGNORED] * len(truth["ids"])
        for start, end in truth["assistant"]:
            expected[start:end] = truth["ids"][start:end]
        assert row["input_ids"] == truth["ids"]
        assert row["labels"] == expected


def test_every_end_of_an_assistant_turn_is_supervised_and_no_prompt_is(
    tokenizer: PreTrainedTokenizerBase, labelled: Label, truths: list[dict[str, Any]]
) -> None:
    rows = labelled([truth["messages"] for truth in truths], tokenizer)
    for row, truth in zip(rows, truths, strict=True):
        learnt = [label for label in row["labels"] if label != IGNORED]
        assert learnt.count(tokenizer.eos_token_id) == len(truth["assistant"])
        assert tokenizer.bos_token_id not in learnt
        said = [m["content"].replace("▁", " ") for m in truth["messages"] if m["role"] == "assistant"]
        ends = [i for i, token in enumerate(learnt) if token == tokenizer.eos_token_id]
        turns = [learnt[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
        assert [tokenizer.decode(turn) for turn in turns] == said


def test_a_long_conversation_is_whole(tokenizer: PreTrainedTokenizerBase, labelled: Label) -> None:
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "word " * 40_000}]
    [row] = labelled([messages], tokenizer)
    assert len(row["input_ids"]) > tokenizer.model_max_length
    assert row["labels"][-1] == tokenizer.eos_token_id
