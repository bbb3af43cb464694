"""Rendered conversations to token ids, such that no typed text becomes a control token; two ways to the same ids.

Why: a Hugging Face tokenizer parses every `</s>`, the user's as well as the template's; `split_special_tokens` parses
neither. How: `AliasedTokenizer` respells the template's control tokens as aliases from Unicode's private planes, and a
copy of the tokenizer that knows its special tokens by alias only encodes the text in one piece; it must find exactly
the template's control tokens. `WordTokenizer` is several times faster: where no piece of the vocabulary has a space
after another character, as in Mistral's BPE, the ids of a text are those of its words, and words repeat. `make` takes
only a tokenizer whose definition shows that this holds. Leaves out added tokens that are not special, as `<think>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune.data.rendering import PRIVATE, Rendered, Spans
from finetune.data.rows import Encoded


class Leak(Exception):
    """Control tokens in the ids that the template did not write, or none where it did."""


class AliasedTokenizer:
    """A tokenizer whose special tokens are found by alias.

    Args:
        definition: its `tokenizer.json`.
        id_of: every special token.
        unknown: the special token for what the vocabulary has not, if there is one.
    """

    def __init__(self, definition: str, id_of: dict[str, int], unknown: str | None) -> None:
        self._definition, self._id_of, self._unknown = definition, id_of, unknown
        self._copies = {PRIVATE.start: self._make(PRIVATE.start)}

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded | Leak]:
        """Ids, and True for those of the spans; or why a row cannot be encoded."""
        return [self._checked(row, *found) for row, found in zip(rows, self._first.encode(rows), strict=True)]

    @property
    def _first(self) -> _Copy:
        return self._copies[PRIVATE.start]

    def _checked(
        self, row: Rendered, encoding: Encoding, ids: np.ndarray, controls: np.ndarray, leak: str | None
    ) -> Encoded | Leak:
        wanted = [self._id_of[special] for special in row.pieces[1::2]]
        if controls.tolist() != wanted:  # an alias was typed, or the tokenizer takes no alias here
            [(encoding, ids, controls, leak)] = self._besides("".join(row.pieces)).encode([row])
        if controls.tolist() != wanted:
            return Leak("the tokenizer does not find the control tokens that the chat template writes")
        if leak is not None:
            return Leak(f"the tokenizer makes the control token {leak!r} out of ordinary text")
        return Encoded(ids, _marks(encoding, row.spans, len(ids)))

    def _besides(self, text: str) -> _Copy:
        """One whose aliases have no character in common with the text."""
        stride = len(self._id_of) + 1
        used = {(ord(c) - PRIVATE.start) // stride for c in set(text) if ord(c) in PRIVATE}
        slots = range(len(PRIVATE) // stride)
        slot = next((s for s in slots if s not in used), None)
        if slot is None:  # more than a hundred private characters, spread out to meet every alias
            return self._first
        base = PRIVATE.start + slot * stride
        if base not in self._copies:
            self._copies[base] = self._make(base)
        return self._copies[base]

    def _make(self, base: int) -> _Copy:
        return _Copy(self._definition, list(self._id_of), self._unknown, base)


class _Copy:
    """A copy of a tokenizer with aliases in characters of `PRIVATE` from `base` on.

    An alias is as long as its token. Its first character is in no other alias and not repeated, so that two of them
    never overlap: what was typed beside one cannot hide it.
    """

    def __init__(self, definition: str, specials: Sequence[str], unknown: str | None, base: int) -> None:
        self.alias = {text: chr(base + 1 + i) + chr(base) * (len(text) - 1) for i, text in enumerate(specials)}
        parts: dict[str, Any] = json.loads(definition)
        real = {self.alias.get(token["content"], token["content"]): token["id"] for token in parts["added_tokens"]}
        for token in parts["added_tokens"]:
            token["content"] = self.alias.get(token["content"], token["content"])
        parts["truncation"] = parts["padding"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(parts))

        total = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._real = np.arange(total, dtype=np.int32)
        self._is_control = np.zeros(total, dtype=bool)
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        for content, i in added.items():
            self._real[i] = real[content]
        self._is_control[[added[alias] for alias in self.alias.values()]] = True
        # Special tokens that are in the vocabulary besides: merges must not make them out of text.
        self._is_forbidden = np.zeros(total, dtype=bool)
        inside = {text: self._tokenizer.token_to_id(text) for text in specials}
        if unknown is not None and inside.get(unknown) in self._tokenizer.encode("\U0010fffd").ids:
            del inside[unknown]  # the honest token of a character that the vocabulary has not
        self._is_forbidden[[i for i in inside.values() if i is not None]] = True

    def encode(self, rows: Sequence[Rendered]) -> list[tuple[Encoding, np.ndarray, np.ndarray, str | None]]:
        """For each row its encoding, the real ids, those ids that are control tokens, and a leaked special token."""
        texts = ["".join(p if i % 2 == 0 else self.alias[p] for i, p in enumerate(row.pieces)) for row in rows]
        found = []
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            raw = np.array(encoding.ids, dtype=np.int32)
            ids = self._real[raw]
            forbidden = raw[self._is_forbidden[raw]]
            leak = self._tokenizer.id_to_token(int(forbidden[0])) if len(forbidden) else None
            found.append((encoding, ids, ids[self._is_control[raw]], leak))
        return found


def _marks(encoding: Encoding, spans: Spans, length: int) -> np.ndarray:
    """True for the tokens of the spans, which count characters."""
    marks = np.zeros(length, dtype=bool)
    for start, end in spans:
        # A normalizer may drop characters; then the nearest one inside the span speaks for them.
        inside = range(start, end)
        first = next((t for t in map(encoding.char_to_token, inside) if t is not None), None)
        last = next((t for t in map(encoding.char_to_token, reversed(inside)) if t is not None), None)
        if first is not None and last is not None:
            # A character may be several tokens, one for each of its bytes; the first was found.
            while last + 1 < length and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
                last += 1
            marks[first : last + 1] = True
    return marks


# ---- word by word ---------------------------------------------------------------------------------------------------


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

Segment = tuple[list[str], bool]  # words, or one control token; and whether they are supervised


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
        return Encoded(ids, np.repeat([is_supervised for _, is_supervised in segments], lengths))


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
