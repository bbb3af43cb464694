"""Conversations to token ids and labels: the assistant's text and its end of sequence are learnt, the prompt is not.

How: the chat template marks what the assistant says, `encoding.py` maps that to tokens, everything else gets -100.
TRL's `SFTTrainer` takes the result as an already processed data set. Leaves out truncation and packing, which TRL does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.encoding import Refused, encoder_of
from finetune.data.learnt import Turns

IGNORED = -100  # the label that cross-entropy leaves out, in torch and in transformers


def supervise(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None) -> Dataset:
    """Tokenizes the column `messages` into the columns `input_ids` and `labels`.

    Args:
        dataset: conversations as `load_conversations` gives them.
        tokenizer: with a chat template that `apply_template` has put on it or accepted.
        num_proc: number of processes; None tokenizes in this one.

    Raises:
        DataError: the chat template refuses a conversation, or would make control tokens of its text; the message
            names the row.
    """
    return dataset.map(
        _encode,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenizing conversations",
    )


def _encode(
    batch: dict[str, list[Turns]], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    try:
        rows = encoder_of(tokenizer).encode(batch["messages"])
    except Refused as refusal:
        raise refusal.error(f"row {indices[refusal.position] + 1} of the data set") from None
    return {
        "input_ids": [row.ids for row in rows],
        "labels": [np.where(row.supervised, row.ids, IGNORED).astype(np.int64) for row in rows],
    }
