"""One chunk of raw rows to an Arrow batch of training rows: parsed, encoded, brought to length and counted.

Why: a row that TRL truncates ends in the middle of an answer, and teaches an answer that does not end. How: an exchange
is what comes up to an assistant turn and that turn. A shortened conversation is whole exchanges with the system
message, encoded anew. Only conversations that are too long are looked at: shortening one encodes two or three prefixes
of it, as their length is interpolated; splitting one encodes it about twice. What cannot be used is refused with a
reason. Leaves out shortening within an exchange: one that does not fit alone is lost, unless the policy is to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from finetune.data.encoding import ChatEncoder, Refused, encoder_of
from finetune.data.forms import parse
from finetune.data.rows import IGNORED, Conversation, Encoded, LossOn, RawChunk
from finetune.data.selection import content_key, signature
from finetune.data.turns import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("position", pa.int64()),
        ("key", pa.binary(16)),
        ("signature", pa.binary()),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("turns", pa.int32()),
        ("turns_with_end", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Supervision:
    """What becomes of a conversation: which turns are supervised, and what happens to one that is too long."""

    loss_on: LossOn = "all"
    max_length: int | None = None
    too_long: TooLong = "truncate"
    signatures: bool = False  # of near duplicates


@dataclass(frozen=True)
class ChunkRows:
    batch: pa.RecordBatch
    first: int
    rows: int
    refused: dict[str, list[int]]
    unseen: dict[str, list[int]]
    lengths: Lengths


@dataclass
class Worker:
    form: Form
    tokenizer: PreTrainedTokenizerBase
    supervision: Supervision

    @cached_property
    def encoder(self) -> ChatEncoder:
        return encoder_of(self.tokenizer)

    def __call__(self, chunk: RawChunk) -> ChunkRows:
        parsed = parse(chunk, self.form)
        refused: dict[str, list[int]] = {}
        for position, reason in parsed.refused:
            refused.setdefault(reason, []).append(position)
        fitter = Fitter(self._encode, self.supervision.max_length, self.supervision.too_long)
        fitted: list[tuple[Conversation, int, list[Encoded]]] = []
        encoded = self.encoder.encode_each(parsed.conversations, loss_on=self.supervision.loss_on)
        for conversation, position, row in zip(parsed.conversations, parsed.positions, encoded, strict=True):
            try:
                if isinstance(row, Refused):
                    raise row
                [rows] = fitter.fit([conversation], [row])  # the template may take a conversation, not its beginning
            except Refused as refusal:
                refused.setdefault(str(refusal), []).append(position)
                continue
            fitted.append((conversation, position, rows))
            for name in row.cut:
                parsed.unseen.setdefault(name, []).append(position)
        read = len(parsed.positions) + len(parsed.refused)
        return ChunkRows(self._batch(fitted), chunk.first, read, refused, parsed.unseen, fitter.lengths)

    def _encode(self, conversations: list[Conversation]) -> list[Encoded]:
        return self.encoder.encode(conversations, loss_on=self.supervision.loss_on)

    def _batch(self, fitted: list[tuple[Conversation, int, list[Encoded]]]) -> pa.RecordBatch:
        """A chunk's rows; the key and the signature of a conversation stand at each of its rows."""
        flat, positions, keys, marks = [], [], [], []
        for conversation, position, rows in fitted:
            key = content_key(conversation) if rows else None
            mark = signature(conversation) if rows and self.supervision.signatures else None
            for row in rows:
                flat.append(row)
                positions.append(position)
                keys.append(key)
                marks.append(mark)
        lengths = np.array([len(row.ids) for row in flat], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.concatenate([row.ids for row in flat]) if flat else np.empty(0, np.int32)
        mask = np.concatenate([row.supervised for row in flat]) if flat else np.empty(0, bool)
        supervised, turns, ended = _count(ids, mask, lengths, offsets, self.tokenizer.eos_token_id)
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.array(np.where(mask, ids, IGNORED).astype(np.int32))),
            pa.array(positions, pa.int64()),
            pa.array(keys, pa.binary(16)),
            pa.array(marks, pa.binary()),
            pa.array(lengths),
            *map(pa.array, (supervised, turns, ended)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _count(
    ids_N: np.ndarray, supervised_N: np.ndarray, lengths_R: np.ndarray, offsets: np.ndarray, eos: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row: supervised tokens, supervised turns, and those of them that end with the end of sequence; int32.

    A turn is a stretch of supervised tokens. It ends with an end of sequence, or where the next token is not supervised
    or belongs to another row.
    """
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    last_N = np.zeros(len(ids_N), dtype=bool)
    last_N[offsets[1:][lengths_R > 0] - 1] = True
    goes_on_N = np.zeros(len(ids_N), dtype=bool)
    goes_on_N[:-1] = supervised_N[1:]
    is_eos_N = ids_N == eos
    ends_N = supervised_N & (last_N | ~goes_on_N | is_eos_N)
    counts = (supervised_N, ends_N, ends_N & is_eos_N)
    supervised, turns, ended = (np.bincount(row_N[mark], minlength=len(lengths_R)).astype(np.int32) for mark in counts)
    return supervised, turns, ended


# ---- conversations that are longer than max_length ------------------------------------------------------------------


TooLong = Literal["truncate", "drop", "split", "cut"]


@dataclass(frozen=True)
class Lengths:
    """What became of the conversations that were too long; add them up over chunks.

    Of `rows` conversations, `dropped` left nothing, `truncated` left one row and `split` left several. Every row keeps
    something supervised. `tokens_lost` counts tokens that are in no row.
    """

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    tokens_lost: int = 0

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Fitter:
    """Makes rows of at most `max_length` tokens and keeps count in `lengths`.

    Args:
        encode: conversations to rows, in order.
        max_length: None leaves every row as it is.
    """

    def __init__(
        self, encode: Callable[[list[Conversation]], list[Encoded]], max_length: int | None, policy: TooLong
    ) -> None:
        self._encode, self._max_length = encode, max_length
        self._shorten: dict[TooLong, Callable[[Conversation, Encoded, int], tuple[list[Encoded], int]]] = {
            "truncate": self._truncate,
            "drop": self._drop,
            "split": self._split,
            "cut": self._cut,
        }
        self._policy = policy
        self.lengths = Lengths()

    def fit(self, conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> list[list[Encoded]]:
        """The rows of each conversation, none where it is dropped; `encoded` holds the conversations' encodings."""
        return [self._fit(*pair) for pair in zip(conversations, encoded, strict=True)]

    def _fit(self, conversation: Conversation, encoded: Encoded) -> list[Encoded]:
        if self._max_length is None or len(encoded.ids) <= self._max_length:
            return [encoded]
        rows, lost = self._shorten[self._policy](conversation, encoded, self._max_length)
        assert all(len(row.ids) <= self._max_length and row.supervised.any() for row in rows), "a row that does not fit"
        self.lengths += Lengths(
            rows=1,
            dropped=int(not rows),
            truncated=int(len(rows) == 1),
            split=int(len(rows) > 1),
            tokens_lost=lost,
        )
        return rows

    # ---- one conversation to the rows that it leaves, and the tokens that are in none of them ----------------------

    def _drop(self, conversation: Conversation, encoded: Encoded, max_length: int) -> tuple[list[Encoded], int]:
        return [], len(encoded.ids)

    def _cut(self, conversation: Conversation, encoded: Encoded, max_length: int) -> tuple[list[Encoded], int]:
        return _kept([Encoded(encoded.ids[:max_length], encoded.supervised[:max_length])], encoded)

    def _truncate(self, conversation: Conversation, encoded: Encoded, max_length: int) -> tuple[list[Encoded], int]:
        """The longest run of exchanges from the beginning that fits."""
        system, exchanges, answered = self._exchanges(conversation, encoded)
        if len(answered.ids) <= max_length:
            return _kept([answered], encoded)
        characters = [0, *accumulate(sum(len(m["content"]) for m in exchange) for exchange in exchanges)]
        # Invariant: `low` exchanges fit (and are `best`), `high` do not. The next guess lies between them as
        # max_length lies between their lengths.
        low, high, best = 0, len(exchanges), None
        low_tokens, high_tokens = 0, len(answered.ids)
        while high - low > 1:
            share = (max_length - low_tokens) / (high_tokens - low_tokens)
            wanted = characters[low] + share * (characters[high] - characters[low])
            guess = int(np.searchsorted(characters, wanted, side="right")) - 1
            guess = min(max(guess, low + 1), high - 1)
            [row] = self._encode([_together(system, exchanges[:guess])])
            if len(row.ids) <= max_length:
                low, low_tokens, best = guess, len(row.ids), row
            else:
                high, high_tokens = guess, len(row.ids)
        return _kept([] if best is None else [best], encoded)

    def _split(self, conversation: Conversation, encoded: Encoded, max_length: int) -> tuple[list[Encoded], int]:
        """Runs of exchanges, each as long as it can be."""
        system, exchanges, answered = self._exchanges(conversation, encoded)
        if len(answered.ids) <= max_length or len(exchanges) == 1:
            return _kept([answered] if len(answered.ids) <= max_length else [], encoded)
        alone = self._encode([_together(system, [exchange]) for exchange in exchanges])
        sizes = [len(row.ids) for row in alone]
        # What every row has besides its exchanges: the beginning of sequence and the system message.
        shared = max(round((sum(sizes) - len(answered.ids)) / (len(exchanges) - 1)), 0)
        rows, lost, begin = [], len(encoded.ids) - len(answered.ids), 0
        while begin < len(exchanges):
            end, row = begin + 1, alone[begin]
            tokens = sizes[begin]
            while end < len(exchanges) and tokens + sizes[end] - shared <= max_length:
                tokens += sizes[end] - shared
                end += 1
            if end > begin + 1:
                end, row = self._longest(system, exchanges, alone, begin, end, max_length)
            if len(row.ids) <= max_length and row.supervised.any():
                rows.append(row)
            else:
                lost += len(row.ids) - shared
            begin = end
        return rows, lost if rows else len(encoded.ids)

    def _longest(
        self,
        system: Conversation,
        exchanges: list[Conversation],
        alone: list[Encoded],
        begin: int,
        end: int,
        max_length: int,
    ) -> tuple[int, Encoded]:
        """The row of the exchanges from `begin` to `end`, or to an earlier end where that row is too long.

        The end was foretold by a sum of lengths, which tokens across a seam may belie.
        """
        while end > begin + 1:
            [row] = self._encode([_together(system, exchanges[begin:end])])
            if len(row.ids) <= max_length:
                return end, row
            end -= 1
        return end, alone[begin]

    def _exchanges(
        self, conversation: Conversation, encoded: Encoded
    ) -> tuple[Conversation, list[Conversation], Encoded]:
        """The system message, if there is one, the exchanges, and their encoding without turns that nothing answers.

        Tools go on answering what they are asked, so an exchange ends with an answer that no tool's follows.
        """
        system = [message for message in conversation[:1] if message["role"] == "system"]
        follows = [message["role"] for message in conversation[len(system) + 1 :]]
        exchanges: list[Conversation] = []
        turns: Conversation = []
        for message, after in zip_longest(conversation[len(system) :], follows):
            turns.append(message)
            if message["role"] == "assistant" and after != "tool":
                exchanges.append(turns)
                turns = []
        if turns:
            [encoded] = self._encode([conversation[: -len(turns)]])
        if "tools" in conversation[0] and not system:  # at the first message of every row
            tools = conversation[0]["tools"]
            exchanges = [[{**exchange[0], "tools": tools}, *exchange[1:]] for exchange in exchanges]
        return system, exchanges, encoded


def _together(system: Conversation, exchanges: Sequence[Conversation]) -> Conversation:
    return [*system, *(message for exchange in exchanges for message in exchange)]


def _kept(rows: list[Encoded], encoded: Encoded) -> tuple[list[Encoded], int]:
    """The rows that teach something, and how much shorter they are than the conversation."""
    rows = [row for row in rows if row.supervised.any()]
    return rows, len(encoded.ids) - sum(len(row.ids) for row in rows)
