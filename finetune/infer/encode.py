"""Prompts as token ids, in which a control token that somebody spelled out is ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data import Refused, encoder_of
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to go on from, with the beginning-of-sequence token where the tokenizer has one.

    Raises:
        DataError: the tokenizer makes control tokens of it.
    """
    begin: Any = tokenizer.bos_token_id
    try:
        return [*([] if begin is None else [int(begin)]), *encoder_of(tokenizer).encode_text(text)]
    except Refused as refusal:
        raise refusal.error("prompt") from None


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    where: str = "messages",
    continues: bool = False,
) -> list[int]:
    """Ids of a conversation of role and content, up to where the answer begins.

    Args:
        continues: the answer goes on in the last message, which is the assistant's.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the model's tokenizer has no chat template",
            where=tokenizer.name_or_path,
            fix="use --raw (or /v1/completions of a server) to continue a text as it stands",
        )
    plain = [dict(message) for message in messages]
    try:
        if continues:
            return encoder_of(tokenizer).encode_unfinished(plain)
        [encoded] = encoder_of(tokenizer).encode([plain], add_generation_prompt=True)
    except Refused as refusal:
        raise refusal.error(where) from None
    return [int(token) for token in encoded.ids]
