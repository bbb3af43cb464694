"""Conversations to token ids, such that what somebody typed is never a control token.

Why: a Hugging Face tokenizer parses every `</s>` in a rendered conversation, the user's as well as the template's;
`split_special_tokens` parses neither. mistral-common keeps the two apart, and so does this file, for any template. How:
`rendering.py` says which control tokens are the template's. Those are respelled as aliases from Unicode's private
planes, and a copy of the tokenizer that knows its special tokens by alias only encodes the text in one piece. What was
typed meets the normalizer and the merges that it would meet anyway, and no seam is cut into it. None of it is taken on
trust: the tokenizer must find exactly the template's control tokens, and no other token may be special; otherwise the
conversation is refused.

Leaves out added tokens that are not special, as `<think>` is in some tokenizers: an assistant may say those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune.data.rendering import PRIVATE, Conversation, Renderer, Spans, TemplateRefusal
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Refused(Exception):
    """A conversation that cannot be encoded; `position` counts from 0 in what was given."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position

    def error(self, where: str) -> DataError:
        """The same for a user, who knows the conversation as `where`."""
        return DataError(
            str(self),
            where=where,
            allowed="roles in the order that the template takes; a template that places texts as they are",
            fix="correct or remove the conversation, or choose another data.template",
        )


@dataclass(frozen=True)
class Encoded:
    """Token ids (int32), and for each whether the template marks it as the assistant's (bool)."""

    ids: np.ndarray
    is_assistant: np.ndarray

    def __post_init__(self) -> None:
        assert self.ids.shape == self.is_assistant.shape, "a token without its mark, or a mark without its token"


class _AliasedTokenizer:
    """A copy of a tokenizer that finds its special tokens by alias, in characters of `PRIVATE` from `base` on.

    An alias is as long as its token. Its first character is in no other alias and not repeated, so that two of them
    never overlap: what was typed beside one cannot hide it.
    """

    def __init__(self, definition: str, specials: Sequence[str], unknown: str | None, base: int) -> None:
        self.alias = {text: chr(base + 1 + i) + chr(base) * (len(text) - 1) for i, text in enumerate(specials)}
        parts = json.loads(definition)
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

    def encode(self, rows: Sequence[Sequence[str]]) -> list[tuple[Encoding, np.ndarray, np.ndarray, str | None]]:
        """Encodes the pieces of `Rendered`.

        Returns:
            for each row its encoding, the real ids, those ids that are control tokens, and a special token that came
            out of text, if one did.
        """
        texts = ["".join(p if i % 2 == 0 else self.alias[p] for i, p in enumerate(pieces)) for pieces in rows]
        found = []
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            raw = np.array(encoding.ids, dtype=np.int32)
            ids = self._real[raw]
            forbidden = raw[self._is_forbidden[raw]]
            leak = self._tokenizer.id_to_token(int(forbidden[0])) if len(forbidden) else None
            found.append((encoding, ids, ids[self._is_control[raw]], leak))
        return found


class ChatEncoder:
    """Encodes conversations with a tokenizer and the chat template that it has now.

    Raises:
        DataError: a tokenizer that is not a fast one, or whose special tokens are not found by another spelling.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        source: Any = tokenizer
        if not source.is_fast:
            raise _unfit(
                tokenizer, "this tokenizer cannot tell a control token from its spelling: it is not a fast one"
            )
        self._definition = source.backend_tokenizer.to_str()
        added = json.loads(self._definition)["added_tokens"]
        named = set(source.all_special_tokens)
        self._id_of = {t["content"]: t["id"] for t in added if t["special"] or t["content"] in named}
        if not self._id_of:
            raise _unfit(tokenizer, "this tokenizer has no special tokens")
        self._unknown = source.unk_token
        self._renderer = None
        if source.chat_template is not None:
            self._renderer = Renderer(source.get_chat_template(), dict(source.special_tokens_map), self._id_of)
        self._aliased = {PRIVATE.start: self._make_aliased(PRIVATE.start)}
        self._require_same_parse(tokenizer)

    def encode(self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False) -> list[Encoded]:
        """Ids and assistant marks of whole conversations, or of prompts that an assistant is to answer.

        Raises:
            Refused: the template does not take a conversation, or makes control tokens of its text.
        """
        assert self._renderer is not None, "conversations need a chat template"
        rendered = []
        for position, messages in enumerate(conversations):
            try:
                rendered.append(self._renderer.render(messages, add_generation_prompt=add_generation_prompt))
            except TemplateRefusal as refusal:
                raise Refused(position, str(refusal)) from None
        encoded = self._encode_pieces([row.pieces for row in rendered])
        return [
            Encoded(ids, _marks(encoding, row.spans, len(ids)))
            for (encoding, ids), row in zip(encoded, rendered, strict=True)
        ]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text without control tokens, whatever it spells."""
        [(_, ids)] = self._encode_pieces([[text]])
        return [int(i) for i in ids]

    def _encode_pieces(self, rows: Sequence[Sequence[str]]) -> list[tuple[Encoding, np.ndarray]]:
        encoded = []
        for position, result in enumerate(self._aliased[PRIVATE.start].encode(rows)):
            pieces = rows[position]
            wanted = [self._id_of[special] for special in pieces[1::2]]
            encoding, ids, controls, leak = result
            if controls.tolist() != wanted:  # an alias was typed, or the tokenizer takes no alias here
                [(encoding, ids, controls, leak)] = self._aliased_besides("".join(pieces)).encode([pieces])
            if controls.tolist() != wanted:
                raise Refused(position, "the tokenizer does not find the control tokens that the chat template writes")
            if leak is not None:
                raise Refused(position, f"the tokenizer makes the control token {leak!r} out of ordinary text")
            encoded.append((encoding, ids))
        return encoded

    def _aliased_besides(self, text: str) -> _AliasedTokenizer:
        """One whose aliases have no character in common with the text."""
        stride = len(self._id_of) + 1
        used = {(ord(c) - PRIVATE.start) // stride for c in set(text) if ord(c) in PRIVATE}
        slots = range(len(PRIVATE) // stride)
        slot = next((s for s in slots if s not in used), None)
        assert slot is not None, "a conversation uses every private character"
        base = PRIVATE.start + slot * stride
        if base not in self._aliased:
            self._aliased[base] = self._make_aliased(base)
        return self._aliased[base]

    def _make_aliased(self, base: int) -> _AliasedTokenizer:
        return _AliasedTokenizer(self._definition, list(self._id_of), self._unknown, base)

    def _require_same_parse(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Aliases must be found exactly as the tokens themselves are where nobody typed any."""
        pieces = [piece for special in self._id_of for piece in ("a ", special, "", special, " b\n", special)]
        native: Any = tokenizer("".join(pieces), add_special_tokens=False, split_special_tokens=False, verbose=False)
        [(_, ids, _, leak)] = self._aliased[PRIVATE.start].encode([[*pieces, ""]])
        if leak is not None or ids.tolist() != native["input_ids"]:
            raise _unfit(tokenizer, "this tokenizer finds its special tokens in a way that cannot be told from text")


_encoders: WeakKeyDictionary[Any, tuple[object, ChatEncoder]] = WeakKeyDictionary()


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer, kept until its template or tokens change (it takes half a second to make)."""
    now = (str(tokenizer.chat_template), sorted(tokenizer.special_tokens_map.items()), len(tokenizer))
    if tokenizer not in _encoders or _encoders[tokenizer][0] != now:
        _encoders[tokenizer] = (now, ChatEncoder(tokenizer))
    return _encoders[tokenizer][1]


def _marks(encoding: Encoding, spans: Spans, length: int) -> np.ndarray:
    """True for the tokens of the spans, which count characters."""
    marks = np.zeros(length, dtype=bool)
    for start, end in spans:
        # A normalizer may drop characters; then the nearest one inside the span speaks for them.
        inside = range(start, end)
        first = next((t for t in map(encoding.char_to_token, inside) if t is not None), None)
        last = next((t for t in map(encoding.char_to_token, reversed(inside)) if t is not None), None)
        if first is not None and last is not None:
            marks[first : last + 1] = True
    return marks


def _unfit(tokenizer: PreTrainedTokenizerBase, what: str) -> DataError:
    return DataError(
        f"{what}, so text that somebody typed could become a control token",
        where=f"tokenizer of {tokenizer.name_or_path}",
        allowed="a tokenizer that transformers loads as a fast one, from a tokenizer.json with special tokens",
        fix="use a model folder with such a tokenizer.json",
    )
