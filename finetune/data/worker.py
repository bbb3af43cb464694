"""One chunk of raw rows to an Arrow batch of training rows: what runs in the processes of `pipeline.py`.

Parsed, checked, encoded, brought to length and counted, in that order; what cannot be used is refused with a reason.
Beside the tokens of a row stand its counts, so that a report over any selection of rows reads no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finetune.data.duplicates import content_key, signature
from finetune.data.encoding import ChatEncoder, Refused, encoder_of
from finetune.data.forms import parse
from finetune.data.lengths import Fitter, Lengths, TooLong
from finetune.data.rows import IGNORED, Conversation, Encoded, LossOn, RawChunk
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
class Teaching:
    """What becomes of a conversation: which turns are learnt, and what happens to one that is too long."""

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
    teaching: Teaching

    @cached_property
    def encoder(self) -> ChatEncoder:
        return encoder_of(self.tokenizer)

    def __call__(self, chunk: RawChunk) -> ChunkRows:
        parsed = parse(chunk, self.form)
        refused: dict[str, list[int]] = {}
        for position, reason in parsed.refused:
            refused.setdefault(reason, []).append(position)
        conversations, positions, encoded = self._encode(parsed.conversations, parsed.positions, refused)
        fitter = Fitter(self._encode_fitting, self.teaching.max_length, self.teaching.too_long)
        fitted: list[tuple[Conversation, int, list[Encoded]]] = []
        for conversation, position, row in zip(conversations, positions, encoded, strict=True):
            try:
                [rows] = fitter.fit([conversation], [row])
            except Refused as refusal:  # a template that takes a conversation, but not the beginning of it
                refused.setdefault(str(refusal), []).append(position)
                continue
            fitted.append((conversation, position, rows))
        batch = self._batch(fitted)
        for position, row in zip(positions, encoded, strict=True):
            for name in row.cut:
                parsed.unseen.setdefault(name, []).append(position)
        read = len(parsed.positions) + len(parsed.refused)
        return ChunkRows(batch, chunk.first, read, refused, parsed.unseen, fitter.lengths)

    def _encode_fitting(self, conversations: list[Conversation]) -> list[Encoded]:
        return self.encoder.encode(conversations, loss_on=self.teaching.loss_on)

    def _encode(
        self, conversations: list[Conversation], positions: list[int], refused: dict[str, list[int]]
    ) -> tuple[list[Conversation], list[int], list[Encoded]]:
        """Without what the template does not take."""
        kept: tuple[list[Conversation], list[int], list[Encoded]] = ([], [], [])
        rows = self.encoder.encode_each(conversations, loss_on=self.teaching.loss_on)
        for conversation, position, row in zip(conversations, positions, rows, strict=True):
            if isinstance(row, Refused):
                refused.setdefault(str(row), []).append(position)
                continue
            kept[0].append(conversation)
            kept[1].append(position)
            kept[2].append(row)
        return kept

    def _batch(self, fitted: list[tuple[Conversation, int, list[Encoded]]]) -> pa.RecordBatch:
        """A chunk's rows; the key and the signature of a conversation stand at each of its rows."""
        flat, positions, keys, marks = [], [], [], []
        for conversation, position, rows in fitted:
            key = content_key(conversation) if rows else None
            mark = signature(conversation) if rows and self.teaching.signatures else None
            for row in rows:
                flat.append(row)
                positions.append(position)
                keys.append(key)
                marks.append(mark)
        lengths = np.array([len(row.ids) for row in flat], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.concatenate([row.ids for row in flat]) if flat else np.empty(0, np.int32)
        learnt = np.concatenate([row.supervised for row in flat]) if flat else np.empty(0, bool)
        supervised, turns, ended = _count(ids, learnt, lengths, offsets, self.tokenizer.eos_token_id)
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.array(np.where(learnt, ids, IGNORED).astype(np.int32))),
            pa.array(positions, pa.int64()),
            pa.array(keys, pa.binary(16)),
            pa.array(marks, pa.binary()),
            pa.array(lengths),
            *map(pa.array, (supervised, turns, ended)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _count(
    ids_N: np.ndarray, learnt_N: np.ndarray, lengths_R: np.ndarray, offsets: np.ndarray, eos: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row: supervised tokens, supervised turns, and those of them that end with the end of sequence; int32.

    A turn is a stretch of supervised tokens that ends where the next token is not learnt or belongs to another row, or
    with an end of sequence.
    """
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    last_N = np.zeros(len(ids_N), dtype=bool)
    last_N[offsets[1:][lengths_R > 0] - 1] = True
    goes_on_N = np.zeros(len(ids_N), dtype=bool)
    goes_on_N[:-1] = learnt_N[1:]
    is_eos_N = ids_N == eos
    ends_N = learnt_N & (last_N | ~goes_on_N | is_eos_N)
    counts = (learnt_N, ends_N, ends_N & is_eos_N)
    supervised, turns, ended = (np.bincount(row_N[mark], minlength=len(lengths_R)).astype(np.int32) for mark in counts)
    return supervised, turns, ended
