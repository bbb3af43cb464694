"""Conversations to token ids and labels: the assistant's text and its end of sequence are learnt, the prompt is not.

How: the chat template marks what the assistant says, the tokenizer maps that to tokens, everything else gets -100.
TRL's `SFTTrainer` takes the result as an already processed data set. Leaves out truncation and packing, which TRL does,
and choosing among turns: every assistant turn is supervised.
"""

from __future__ import annotations

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetune.data.chat import Conversation, encode
from finetune.errors import DataError

IGNORED = -100  # the label that cross-entropy leaves out, in torch and in transformers


def supervise(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None) -> Dataset:
    """Tokenizes the column `messages` into the columns `input_ids` and `labels`.

    Args:
        dataset: conversations as `load_conversations` gives them.
        tokenizer: with a chat template that `apply_template` has put on it or accepted.
        num_proc: number of processes; None tokenizes in this one.

    Raises:
        DataError: the chat template refuses a conversation; the message names its row.
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
    batch: dict[str, list[Conversation]], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    try:
        ids, masks = encode(tokenizer, batch["messages"])
    except TemplateError:
        raise _refusal(batch["messages"], indices, tokenizer) from None
    labels = [
        [token if mark else IGNORED for token, mark in zip(row, mask, strict=True)]
        for row, mask in zip(ids, masks, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _refusal(conversations: list[Conversation], indices: list[int], tokenizer: PreTrainedTokenizerBase) -> DataError:
    """Finds the first conversation of a batch that the template refuses."""
    for messages, index in zip(conversations, indices, strict=True):
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as fault:
            return DataError(
                f"the chat template refuses a conversation: {fault}",
                where=f"row {index + 1} of the data set",
                fix="correct or remove the conversation, or choose another data.template",
            )
    raise AssertionError("a batch was refused whose conversations are accepted one by one")
