"""Rendered conversations to token ids word by word, for BPE tokenizers of Mistral's kind: several times faster.

Why: such a tokenizer has no pre-tokenizer, so it normalizes and merges every conversation as one long word. How: where
no piece of the vocabulary has a space after another character, no merge can reach from one word into the next, so the
ids of a text are those of its words, and words repeat. Their ids are kept as bytes and joined. Control tokens come from
the rendered pieces, not from the text, so nothing that was typed can become one. `make` takes only a tokenizer whose
definition shows that all of that holds; any other is left to `aliases.py`, and so is a conversation whose assistant
begins or ends inside a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from finetune.data.rendering import Rendered
from finetune.data.rows import Encoded

SPACE = "▁"
_WORD = re.compile(f"{SPACE}+[^{SPACE}]*")
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": True,
    "ignore_merges": False,
}
_ENTRY_BYTES = 150  # of a kept word beside its text: two objects and a place in the dictionary
_KEPT_BYTES = 64 * 2**20

Segment = tuple[list[str], bool]  # words, or one control token; and whether they are learnt


class WordTokenizer:
    """A tokenizer that keeps the ids of words. Made by `make`."""

    def __init__(self, model: Tokenizer, id_of: dict[str, int]) -> None:
        self._model = model
        self._controls = {text: np.int32(i).tobytes() for text, i in id_of.items()}
        self._kept: dict[str, bytes] = dict(self._controls)
        self._size = 0

    @staticmethod
    def make(definition: str, id_of: dict[str, int]) -> WordTokenizer | None:
        """One for this `tokenizer.json` with these special tokens, or None where words could differ from the text."""
        parts: dict[str, Any] = json.loads(definition)
        if not _is_fit(parts, id_of):
            return None
        for name in ("normalizer", "truncation", "padding", "post_processor"):
            parts[name] = None
        parts["added_tokens"] = []
        return WordTokenizer(Tokenizer.from_str(json.dumps(parts)), id_of)

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded | None]:
        """Ids, and True for those of the spans; None for a row with a span that begins or ends inside a word."""
        if self._size > _KEPT_BYTES:
            self._kept, self._size = dict(self._controls), 0
        kept = self._kept  # another thread may begin anew meanwhile
        cut = [_segments(row) for row in rows]
        self._keep((word for parts in cut if parts is not None for words, _ in parts for word in words), kept)
        return [None if segments is None else self._join(segments, kept) for segments in cut]

    def _keep(self, words: Iterable[str], kept: dict[str, bytes]) -> None:
        """Encodes those words that are new."""
        new = list(set(words).difference(kept))
        for word, encoding in zip(new, self._model.encode_batch_fast(new, add_special_tokens=False), strict=True):
            kept[word] = np.array(encoding.ids, dtype=np.int32).tobytes()
            self._size += 5 * len(word) + _ENTRY_BYTES

    def _join(self, segments: list[Segment], kept: dict[str, bytes]) -> Encoded:
        stretches = [b"".join([kept[word] for word in words]) for words, _ in segments]
        ids = np.frombuffer(b"".join(stretches), dtype=np.int32).copy()
        lengths = [len(stretch) // ids.itemsize for stretch in stretches]
        return Encoded(ids, np.repeat([is_learnt for _, is_learnt in segments], lengths))


def _is_fit(parts: dict[str, Any], id_of: dict[str, int]) -> bool:
    model, added = parts["model"], parts["added_tokens"]
    if parts["normalizer"] != _NORMALIZER or parts["pre_tokenizer"] is not None:
        return False
    if {name: model.get(name) for name in _MODEL} != _MODEL:
        return False
    # Added tokens are found as they are spelled, and all of them are control tokens.
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if any(token[flag] for token in added for flag in flags) or {token["content"] for token in added} != set(id_of):
        return False
    vocabulary = model["vocab"]
    if any(SPACE in piece.lstrip(SPACE) for piece in vocabulary):
        return False
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return False  # else some text is unknown, and unknown words in a row may be one token
    # No text becomes a control token: none is one character long, and no merge makes one. A control token's text never
    # holds a space or begins a word, so it is also no word that is kept.
    merged = {left + right for left, right in model["merges"]}
    return not any(len(text) == 1 or SPACE in text or text in merged for text in id_of)


def _segments(row: Rendered) -> list[Segment] | None:
    """The row cut at control tokens and at the bounds of its spans."""
    segments: list[Segment] = []
    bounds = [bound for span in row.spans for bound in span] + [sum(map(len, row.pieces))]
    position, passed = 0, 0  # characters before, bounds before
    for number, piece in enumerate(row.pieces):
        end = position + len(piece)
        text, done = piece if number % 2 else SPACE + piece.replace(" ", SPACE), 0
        while passed < len(bounds) and bounds[passed] < end:
            at = bounds[passed] - position
            if at > 0:
                at += 1  # for the space in front
                if number % 2 or text[at] != SPACE or text[at - 1] == SPACE:
                    return None
                segments.append((_WORD.findall(text[done:at]), passed % 2 == 1))
                done = at
            passed += 1
        if piece:
            segments.append(([text] if number % 2 else _WORD.findall(text[done:]), passed % 2 == 1))
        position = end
    return segments
