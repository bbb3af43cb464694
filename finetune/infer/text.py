"""Text of an answer while it is generated: whole characters only, and never a part of a stop text.

The pieces together are the tokenizer's own decoding of all tokens, whatever these are. Tokens are decoded in the
company of those before them, since what a token says depends on them: a first word loses its space, and bytes that
stand together (`<0xF0>` and its like) are one text, or, if they are none, all of them U+FFFD. So bytes are held back
until a token follows that is none: what comes may still spoil them. A stop text in them ends the answer at once.
What may still become a stop text is held back until it cannot.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

# Enough of a prompt to know whether a word begins: a character takes at most four tokens.
_CONTEXT = 8
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class AnswerText:
    """The text of one answer.

    Args:
        after: tokens that the text goes on from; without them, the space of a first word is not part of it, as in
            the tokenizer's own decoding.

    Attributes:
        stop: the stop text that was met, if one was; nothing after it is given out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], after: Sequence[int] = ()):
        self._tokenizer, self._stops = tokenizer.backend_tokenizer, tuple(stops)
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._context: list[int] = []  # tokens whose text was given out; those after them need their company
        self._open: list[int] = []  # tokens after them
        self._bytes = _Bytes()  # of these, the bytes at the end
        self._given = 0  # characters of context and open tokens that need not be given out any more
        self._unfinished = False  # whether the last of these characters may be the beginning of another
        self._held = ""
        self.stop: str | None = None
        self._go_on_from([token for token in after if self._is_text(token)])

    def add(self, token: int) -> str:
        """What the token lets be given out."""
        if not self._is_text(token):
            return ""
        self._open.append(token)
        byte = self._byte_of(token)
        if byte is not None:
            self._bytes.add(byte)
            return self._release(self._new_text()) if self._bytes_stop() else ""
        self._bytes = _Bytes()
        piece = self._new_text()
        if not self._unfinished:
            self._context, self._open = self._open, []
            self._given = len(self._decode(self._context))
        return self._release(piece)

    def end(self) -> str:
        """What was held back: the beginning of a stop text, or bytes that are no whole character."""
        if self.stop is not None:
            return ""
        given = self._release(self._decode([*self._context, *self._open])[self._given :])
        rest, self._held = self._held, ""
        return given if self.stop is not None else given + rest

    def _go_on_from(self, tokens: list[int]) -> None:
        bytes_begin = len(tokens)
        while bytes_begin and (byte := self._byte_of(tokens[bytes_begin - 1])) is not None:
            bytes_begin -= 1
        for token in tokens[bytes_begin:]:
            byte = self._byte_of(token)
            assert byte is not None
            self._bytes.add(byte)
        self._context, self._open = tokens[max(0, bytes_begin - _CONTEXT) : bytes_begin], tokens[bytes_begin:]
        # A character whose first bytes the prompt ends with is shown whole.
        if tokens[bytes_begin:]:
            self._given = len(self._decode(self._context)) + len(self._bytes.text)
        else:
            self._new_text()

    def _new_text(self) -> str:
        """Of context and open tokens, what has not been given out and is not a character's beginning; it is now."""
        text = self._decode([*self._context, *self._open])
        self._unfinished = text.endswith(_UNKNOWN)
        begin, self._given = self._given, max(self._given, len(text) - self._unfinished)
        return text[begin : self._given]

    def _bytes_stop(self) -> bool:
        """Whether the text, if it ended with these bytes, would end with a stop text."""
        longest = max(map(len, self._stops), default=0)
        text = self._held + self._bytes.text[-longest:]
        return bool(self._bytes.text) and text.endswith(self._stops)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _is_text(self, token: int) -> bool:
        """Not so of control tokens, and of rows of the embeddings that are no token: decoding passes them over."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _byte_of(self, token: int) -> int | None:
        found = _BYTE.fullmatch(self._tokenizer.id_to_token(token))
        return None if found is None else int(found[1], 16)

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
    """Bytes that stand together, and the whole characters among them; none from the first that fits no character."""

    def __init__(self) -> None:
        self.text = ""
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()

    def add(self, byte: int) -> None:
        if self._decoder is not None:
            try:
                self.text += self._decoder.decode(bytes([byte]))
            except UnicodeDecodeError:
                self.text, self._decoder = "", None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
