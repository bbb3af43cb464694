"""What passes between the steps of the data path: raw chunks, parsed rows, encoded rows.

    reader ──RawChunk──► worker: forms ──Parsed──► encoder ──Encoded──► lengths ──► Arrow on the disk

A chunk is small and can be sent to another process, so the work on rows runs in parallel, and a set larger than memory
is never held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

Unit = Literal["line", "row"]
Role = Literal["system", "user", "assistant", "tool"]
LossOn = Literal["all", "last", "completion"]

IGNORED = -100  # the label that cross-entropy leaves out, in torch and in transformers


class Message(TypedDict):
    """A checked turn. `train` is False where a row says so, and on the prompt's turns of a prompt and completion.

    What follows is for chat templates alone (messages.py). `tools`, which the whole conversation may call, stands at
    its first message.
    """

    role: Role
    content: str
    train: bool
    tools: NotRequired[list[dict[str, Any]]]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]


Conversation = list[Message]
Turns = Sequence[Mapping[str, Any]]  # a conversation, or messages without `train`, as the prompt of `generate` is


class RowFault(Exception):
    """Why one row cannot be used; the text is the same for every row with the same fault.

    `fix` says what to do where a whole file has the fault.
    """

    def __init__(self, reason: str, *, fix: str | None = None) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of one source as they were read: JSON lines as bytes (unparsed), any other source as values.

    `first` is the position of the first row, counted from 1 in the source's unit. Positions are consecutive; an empty
    line is an empty bytes object, and no row.
    """

    source: int
    first: int
    lines: list[bytes] | None = None
    values: list[Any] | None = None

    def __post_init__(self) -> None:
        assert (self.lines is None) != (self.values is None), "a chunk holds lines or values"


@dataclass(frozen=True)
class Parsed:
    """The rows of a chunk: usable ones with their positions, refused ones as (position, reason).

    `unseen` names what usable rows hold and nobody reads (`forms.py`), with their positions.
    """

    conversations: list[Conversation]
    positions: list[int]
    refused: list[tuple[int, str]]
    unseen: dict[str, list[int]]

    def __post_init__(self) -> None:
        assert len(self.conversations) == len(self.positions), "a position for each conversation"


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids (int32), and for each token whether it is supervised (bool).

    `cut` names what the chat template left out of the conversation.
    """

    ids: np.ndarray
    supervised: np.ndarray
    cut: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.ids.shape == self.supervised.shape, "a token without its mark, or a mark without its token"
