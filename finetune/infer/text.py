"""Text of an answer while it is generated: whole characters only, and never a part of a stop text.

tokenizers' own stream decodes token by token; what may still become a stop text is held back until it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """The text of one answer.

    Attributes:
        stop: the stop text that was met, if one was; nothing after it is given out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0
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
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        given = self._release(whole[self._decoded :])
        rest, self._held = self._held, ""
        return given if self.stop is not None else given + rest

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
