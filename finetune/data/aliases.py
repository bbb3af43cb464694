"""Rendered conversations to token ids with any fast tokenizer, such that no typed text is a control token.

Why: a Hugging Face tokenizer parses every `</s>`, the user's as well as the template's; `split_special_tokens` parses
neither. How: the template's control tokens are respelled as aliases from Unicode's private planes, and a copy of the
tokenizer that knows its special tokens by alias only encodes the text in one piece. What was typed meets the normalizer
and the merges that it would meet anyway, and no seam is cut into it. None of it is taken on trust: the tokenizer must
find exactly the template's control tokens, and no other token may be special.

Leaves out added tokens that are not special, as `<think>` is in some tokenizers: an assistant may say those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune.data.prefixes import Spans
from finetune.data.rendering import PRIVATE, Rendered
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
