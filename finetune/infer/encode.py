"""Prompts as token ids, in which a control token that somebody spelled out is ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.encoding import Refused, encoder_of
from finetune.errors import DataError
from finetune.model import LoadedModel


def encode_text(loaded: LoadedModel, text: str) -> list[int]:
    """Ids of a text to go on from, with the beginning-of-sequence token."""
    tokenizer: Any = loaded.tokenizer
    return [tokenizer.bos_token_id, *encoder_of(tokenizer).encode_text(text)]


def encode_messages(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], *, where: str = "messages"
) -> list[int]:
    """Ids of a conversation of role and content, up to where the answer begins.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses the conversation.
    """
    tokenizer: Any = loaded.tokenizer
    if tokenizer.chat_template is None:
        raise DataError(
            "the model's tokenizer has no chat template",
            where=loaded.base.path,
            fix="use --raw (or /v1/completions of a server) to continue a text as it stands",
        )
    try:
        [encoded] = encoder_of(tokenizer).encode([[dict(message) for message in messages]], add_generation_prompt=True)
    except Refused as refusal:
        raise refusal.error(where) from None
    return [int(token) for token in encoded.ids]
