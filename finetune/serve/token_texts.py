"""Bytes and text of single tokens, for log-probabilities.

`tokenizer.decode` of one token will not do: it drops the space at the beginning of a SentencePiece word, and shows
every part of a character as the same replacement character.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LEAST = -9999.0  # OpenAI's for a token that cannot come


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return logprob if logprob is None or math.isfinite(logprob) else _LEAST


class TokenTexts:
    """Bytes and texts of a tokenizer's tokens, for SentencePiece and GPT-2 vocabularies."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer: Any = tokenizer
        self._known: dict[int, bytes] = {}
        self._special = frozenset(self._tokenizer.all_special_ids)
        decoder = json.loads(self._tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        byte_level = any(kind.get("type") == "ByteLevel" for kind in kinds)
        self._byte_of = {character: byte for byte, character in _gpt2_letters().items()} if byte_level else None

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; empty for an embedding row that is not a token."""
        if token not in self._known:
            self._known[token] = self._find_bytes(token)
        return self._known[token]

    def _find_bytes(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if token in self._special:
            return name.encode()
        if self._byte_of is not None:
            # An added token is written in plain letters.
            if all(letter in self._byte_of for letter in name):
                return bytes(self._byte_of[letter] for letter in name)
            return name.encode()
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()

    def shown(self, token: int) -> str:
        r"""The text of a token, or `bytes:\xe2\x80` where it is a part of a character, as OpenAI writes it."""
        data = self.spelled(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffset:
    """Where in an answer's text its tokens begin, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def before(self, data: bytes) -> int:
        """Where the text of the next token begins, which has these bytes."""
        begin = self._characters
        self._characters += len(self._decoder.decode(data))
        return begin


def _gpt2_letters() -> dict[int, str]:
    """The letter for each byte in a byte-level vocabulary: the byte itself if it is visible, else one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + place) for place, byte in enumerate(hidden)}}
