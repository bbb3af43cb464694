"""Prompts as token ids, in which a control token that somebody spelled out is ordinary text; and the text of an answer
while it is generated: whole characters only, and never a part of a stop text.

The pieces joined are exactly the tokenizer's decoding of all tokens, whatever these are. Tokens are decoded together
with those before them, because the text of a token depends on them: a first word loses its space, and adjacent byte
tokens (`<0xF0>` and the like) are one text or, if they are not valid UTF-8, all U+FFFD. So bytes are held back until
another kind of token follows, since the next byte may still make them invalid. A stop text in them ends the answer at
once. Text that may still become a stop text is held back until it cannot.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data import Refused, encoder_of
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough of a prompt to know whether a word begins: a character takes at most four tokens.
_CONTEXT = 8
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to continue, with the beginning-of-sequence token where the tokenizer has one.

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
        continues: whether the answer continues the last message, which must be the assistant's.

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


class Vocabulary:
    """What the tokens of a tokenizer stand for; built once, since a tokenizer may have a thousand control tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def is_text(self, token: int) -> bool:
        """False for control tokens and for embedding rows without a token, which decoding skips."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def byte_of(self, token: int) -> int | None:
        found = _BYTE.fullmatch(self._tokenizer.id_to_token(token))
        return None if found is None else int(found[1], 16)


@dataclass(frozen=True)
class PromptEnd:
    """What an answer that continues a prompt's text needs to know of the prompt; read once for all its answers.

    Attributes:
        context: its last tokens: all adjacent byte tokens at its end, because the answer's bytes may continue them, and
            a few before, which show whether a word begins.
        given: how many characters of these the prompt has shown.
        bytes_text, bytes_left: the state of `_Bytes` after the bytes at the end.
    """

    context: tuple[int, ...] = ()
    given: int = 0
    bytes_text: str = ""
    bytes_left: bytes | None = b""

    @classmethod
    def of(cls, vocabulary: Vocabulary, ids: Sequence[int]) -> PromptEnd:
        """Reads token ids [N] from their end, only as far back as needed."""
        ends_with, before = bytearray(), 0
        context: list[int] = []
        for token in reversed(ids):
            if not vocabulary.is_text(token):
                continue
            context.append(token)
            byte = None if before else vocabulary.byte_of(token)
            if byte is not None:
                ends_with.append(byte)
                continue
            before += 1
            if before == _CONTEXT:
                break
        context.reverse()
        end = _Bytes()
        end.add(bytes(reversed(ends_with)))
        shown = vocabulary.decode(context[:before])
        # A character whose first bytes the prompt ends with is shown whole.
        given = len(shown) + len(end.text) if ends_with else len(shown) - shown.endswith(_UNKNOWN)
        return cls(tuple(context), given, end.text, end.left)


class AnswerText:
    """The text of one answer.

    Args:
        after: the end of the prompt that the text continues; without it, the space of a first word is dropped, as in
            the tokenizer's own decoding.

    Attributes:
        stop: the stop text that was found, if any; no text after it is returned.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], after: PromptEnd | None = None):
        after = after or PromptEnd()
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._context: Sequence[int] = after.context  # whose text was given out; tokens after it need its company
        self._open: list[int] = []  # tokens after it
        self._bytes = _Bytes(after.bytes_text, after.bytes_left)  # those at the end of both
        self._given = after.given  # characters of context and open tokens that need not be given out any more
        self._unfinished = False  # whether the last of these characters may be the beginning of another
        self._held = ""
        self.stop: str | None = None

    def add(self, token: int) -> str:
        """Adds a token; returns the text that can be shown now."""
        if not self._vocabulary.is_text(token):
            return ""
        self._open.append(token)
        byte = self._vocabulary.byte_of(token)
        if byte is not None:
            self._bytes.add(bytes([byte]))
            return self._release(self._new_text()) if self._bytes_stop() else ""
        self._bytes = _Bytes()
        piece = self._new_text()
        if not self._unfinished:
            self._context, self._open = self._open, []
            self._given = len(self._vocabulary.decode(self._context))
        return self._release(piece)

    def end(self) -> str:
        """The text that was held back: the beginning of a stop text, or an incomplete character."""
        if self.stop is not None:
            return ""
        given = self._release(self._vocabulary.decode([*self._context, *self._open])[self._given :])
        rest, self._held = self._held, ""
        return given if self.stop is not None else given + rest

    def _new_text(self) -> str:
        """Of context and open tokens, what has not been given out and is not a character's beginning; it is now."""
        text = self._vocabulary.decode([*self._context, *self._open])
        self._unfinished = text.endswith(_UNKNOWN)
        begin, self._given = self._given, max(self._given, len(text) - self._unfinished)
        return text[begin : self._given]

    def _bytes_stop(self) -> bool:
        """Whether the text, if it ended with these bytes, would end with a stop text."""
        longest = max(map(len, self._stops), default=0)
        text = self._held + self._bytes.text[-longest:]
        return bool(self._bytes.text) and text.endswith(self._stops)

    def _release(self, piece: str) -> str:
        if self.stop is not None:
            return ""
        text = self._held + piece
        met = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if met:
            at, self.stop = min(met)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class _Bytes:
    """Adjacent bytes: `text` is their whole characters, `left` the beginning of the next one, None once they are not
    valid UTF-8."""

    def __init__(self, text: str = "", left: bytes | None = b"") -> None:
        self.text, self.left = text, left

    def add(self, data: bytes) -> None:
        if self.left is None:
            return
        try:
            text, used = codecs.utf_8_decode(self.left + data, "strict", False)
        except UnicodeDecodeError:
            self.text, self.left = "", None
        else:
            self.text, self.left = self.text + text, (self.left + data)[used:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
