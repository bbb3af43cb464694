"""Text of an answer while it is generated: whole characters only, and never a part of a stop text.

tokenizers' own stream decodes token by token; what may still become a stop text is held back until it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

# Enough of a prompt to know whether a word begins: a character takes at most four byte tokens.
_CONTEXT = 8


class AnswerText:
    """The text of one answer.

    Args:
        after: tokens that the text goes on from; without them, the space of a first word is not part of it, as in
            the tokenizer's own decoding.

    Attributes:
        stop: the stop text that was met, if one was; nothing after it is given out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], after: Sequence[int] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = list(after[-_CONTEXT:])
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)
        self._decoded = len(self._whole())
        self._held = ""
        self.stop: str | None = None

    def add(self, token: int) -> str:
        """What the token lets be given out."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        return self._release(piece)

    def end(self) -> str:
        """What was held back: the beginning of a stop text, or bytes that are no whole character."""
        if self.stop is not None:
            return ""
        given = self._release(self._whole()[self._decoded :])
        rest, self._held = self._held, ""
        return given if self.stop is not None else given + rest

    def _whole(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
