"""Conversations to training rows: token ids, and which of them are supervised.

Why: a rendered conversation does not say whose `</s>` is whose, and a wrong loss mask is the most silent of faults.
mistral-common keeps the two apart, and so does this file, for any template. How: `rendering.py` says which control
tokens are the template's and where the assistant speaks, `supervised_turns` which of its turns count, and
`tokenizing.py` encodes the text such that what somebody typed is never a control token. An encoder can be sent to
another process. Leaves out lengths: every row is as long as its conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.data.rendering import Rendered, Renderer, TemplateRefusal
from finetune.data.rows import Encoded, LossOn, Turns
from finetune.data.tokenizing import AliasedTokenizer, Leak, WordTokenizer
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Refused(Exception):
    """A conversation that cannot be encoded; `position` counts from 0 in what was given."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position

    def __reduce__(self) -> tuple[type[Refused], tuple[int, str]]:
        return Refused, (self.position, str(self))

    def error(self, where: str) -> DataError:
        """The same for a user, who knows the conversation as `where`."""
        return DataError(
            str(self),
            where=where,
            allowed="roles in the order that the template takes; a template that places texts as they are",
            fix="correct or remove the conversation, or choose another data.template",
        )


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
        definition = source.backend_tokenizer.to_str()
        added = json.loads(definition)["added_tokens"]
        named = set(source.all_special_tokens)
        id_of = {t["content"]: t["id"] for t in added if t["special"] or t["content"] in named}
        if not id_of:
            raise _unfit(tokenizer, "this tokenizer has no special tokens")
        self._renderer = None
        if source.chat_template is not None:
            self._renderer = Renderer(source.get_chat_template(), dict(source.special_tokens_map), id_of)
        self._tokenizer, self._words = _tokenizers(definition, tuple(id_of.items()), source.unk_token)
        self._require_same_parse(tokenizer, list(id_of))

    def encode(
        self, conversations: Sequence[Turns], *, loss_on: LossOn = "all", add_generation_prompt: bool = False
    ) -> list[Encoded]:
        """Training rows of whole conversations, or prompts for an assistant to answer, which supervise nothing.

        Args:
            conversations: messages with `role`, `content`, and `train`, which is True where it is missing.
            loss_on: which assistant turns count (`supervised_turns`). The end of sequence is part of a turn.
            add_generation_prompt: end where the assistant should begin.

        Raises:
            Refused: the first conversation that `encode_each` refuses.
        """
        rows = []
        for row in self.encode_each(conversations, loss_on=loss_on, add_generation_prompt=add_generation_prompt):
            if isinstance(row, Refused):
                raise row
            rows.append(row)
        return rows

    def encode_each(
        self, conversations: Sequence[Turns], *, loss_on: LossOn = "all", add_generation_prompt: bool = False
    ) -> list[Encoded | Refused]:
        """The same for data of which some may be unfit: in a conversation's place why it is refused.

        The template does not take it, or makes control tokens of its text, or does not say which turn is which.
        """
        rendered: list[Rendered | TemplateRefusal] = []
        for messages in conversations:
            try:
                rendered.append(self._render(messages, loss_on, add_generation_prompt))
            except TemplateRefusal as refusal:
                rendered.append(refusal)
        fine = iter(self._encode_rendered([row for row in rendered if isinstance(row, Rendered)]))
        rows = [_with_cut(next(fine), row) if isinstance(row, Rendered) else row for row in rendered]
        return [row if isinstance(row, Encoded) else Refused(number, str(row)) for number, row in enumerate(rows)]

    def encode_unfinished(self, messages: Turns) -> list[int]:
        """Ids of a conversation whose last message is to go on: all up to the end of its text.

        Raises:
            Refused: as `encode_each`; or the template does not write the last message as it stands.
        """
        assert self._renderer is not None, "conversations need a chat template"
        try:
            rendered = self._renderer.render_unfinished(messages)
        except TemplateRefusal as refusal:
            raise Refused(0, str(refusal)) from None
        return self._plain_ids(rendered)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text without control tokens, whatever it spells.

        Raises:
            Refused: the tokenizer makes control tokens of it.
        """
        return self._plain_ids(Rendered([text], []))

    def _plain_ids(self, rendered: Rendered) -> list[int]:
        [row] = self._encode_rendered([rendered])
        if isinstance(row, Leak):
            raise Refused(0, str(row))
        return [int(i) for i in row.ids]

    def _encode_rendered(self, rows: list[Rendered]) -> list[Encoded | Leak]:
        if self._words is None:
            return self._tokenizer.encode(rows)
        by_words = self._words.encode(rows)
        left = iter(self._tokenizer.encode([row for row, done in zip(rows, by_words, strict=True) if done is None]))
        return [next(left) if done is None else done for done in by_words]

    def _render(self, messages: Turns, loss_on: LossOn, add_generation_prompt: bool) -> Rendered:
        """A conversation with the spans that are supervised."""
        assert self._renderer is not None, "conversations need a chat template"
        rendered = self._renderer.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return replace(rendered, spans=[])
        chosen = supervised_turns(messages, loss_on)
        if all(chosen):
            return rendered
        if len(rendered.spans) != len(chosen):
            raise TemplateRefusal(
                f"the chat template marks {len(rendered.spans)} stretches of a conversation with {len(chosen)} "
                "assistant turns, so it cannot be told which of them to learn"
            )
        spans = [span for span, is_supervised in zip(rendered.spans, chosen, strict=True) if is_supervised]
        return replace(rendered, spans=spans)

    def _require_same_parse(self, tokenizer: PreTrainedTokenizerBase, specials: list[str]) -> None:
        """Aliases must be found exactly as the tokens themselves are where nobody typed any."""
        pieces = [piece for special in specials for piece in ("a ", special, "", special, " b\n", special)]
        native: Any = tokenizer("".join(pieces), add_special_tokens=False, split_special_tokens=False, verbose=False)
        [row] = self._tokenizer.encode([Rendered([*pieces, ""], [])])
        if isinstance(row, Leak) or row.ids.tolist() != native["input_ids"]:
            raise _unfit(tokenizer, "this tokenizer finds its special tokens in a way that cannot be told from text")


@lru_cache(maxsize=2)
def _tokenizers(
    definition: str, specials: tuple[tuple[str, int], ...], unknown: str | None
) -> tuple[AliasedTokenizer, WordTokenizer | None]:
    """Most of an encoder's 0.4 s (32,000 tokens, one core); encoders that differ in their template share them."""
    id_of = dict(specials)
    return AliasedTokenizer(definition, id_of, unknown), WordTokenizer.make(definition, id_of)


def _with_cut(row: Encoded | Leak, rendered: Rendered) -> Encoded | Leak:
    return replace(row, cut=rendered.cut) if rendered.cut and isinstance(row, Encoded) else row


_encoders: WeakKeyDictionary[Any, tuple[object, ChatEncoder]] = WeakKeyDictionary()
# By what makes them: a run loads its tokenizer three times.
_alike: dict[bytes, ChatEncoder] = {}
_ALIKE_KEPT = 4


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer, kept until its template or tokens change and shared with equal tokenizers."""
    now = (str(tokenizer.chat_template), sorted(tokenizer.special_tokens_map.items()), len(tokenizer))
    if tokenizer not in _encoders or _encoders[tokenizer][0] != now:
        _encoders[tokenizer] = (now, _shared(tokenizer, now))
    return _encoders[tokenizer][1]


def _shared(tokenizer: Any, now: object) -> ChatEncoder:
    if not tokenizer.is_fast:
        return ChatEncoder(tokenizer)  # says what is wrong
    content = f"{now} {tokenizer.all_special_tokens} {tokenizer.backend_tokenizer.to_str()}"
    key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if key not in _alike:
        made = ChatEncoder(tokenizer)
        while len(_alike) >= _ALIKE_KEPT:
            del _alike[next(iter(_alike))]
        _alike[key] = made
    return _alike[key]


def encode_settings(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides the ids and marks of a conversation: the tokenizer, its template and special tokens.

    The same in every process and on every machine. Truncation and padding are left out: no encoder uses them.
    """
    source: Any = tokenizer
    template = None if source.chat_template is None else source.get_chat_template()
    words = {"template": template, "special_tokens": dict(source.special_tokens_map)}
    return _digest(source.backend_tokenizer.to_str(), json.dumps(words))


@lru_cache(maxsize=1)
def _digest(definition: str, words: str) -> str:
    """A run asks for every source that it reads; parsing takes 0.1 s a megabyte."""
    tokenizer = json.loads(definition) | {"truncation": None, "padding": None}
    settings = json.dumps(json.loads(words) | {"tokenizer": tokenizer}, sort_keys=True)
    return hashlib.blake2b(settings.encode("ascii"), digest_size=16).hexdigest()


def _unfit(tokenizer: PreTrainedTokenizerBase, what: str) -> DataError:
    return DataError(
        f"{what}, so text that somebody typed could become a control token",
        where=f"tokenizer of {tokenizer.name_or_path}",
        allowed="a tokenizer that transformers loads as a fast one, from a tokenizer.json with special tokens",
        fix="use a model folder with such a tokenizer.json",
    )


def supervised_turns(messages: Turns, loss_on: LossOn) -> list[bool]:
    """For each assistant turn, in order, whether it is supervised.

    The row must not say `train: false` for it, and `loss_on` must take it: all; the last; or the completion, which is
    what follows the last turn with `train: false` (the prompt of a row of prompt and completion), or the last turn
    where no turn has that.
    """
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    untrained = [number for number, message in enumerate(messages) if not message.get("train", True)]
    first = 0
    if loss_on == "completion" and untrained:
        first = untrained[-1] + 1
    elif loss_on != "all" and numbers:
        first = numbers[-1]
    return [number >= first and messages[number].get("train", True) for number in numbers]


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; joined, the pieces are that text, control tokens written out.

    A character that several tokens spell byte by byte belongs to the last of them, the others add nothing. Takes the
    square of the length: for texts to be looked at.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one row is decoded to one text"
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
