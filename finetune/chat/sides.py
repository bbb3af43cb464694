"""The page's conversation: one or two models answer the same questions, each continuing from its own answers.

Plain data and generators that know nothing of the page, so they can be tested without a browser. A side that joins
later continues from the first side's answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.chat.answering import Answering, is_full, request_for
from finetune.chat.conversation import Conversation
from finetune.infer import FinishedEvent, Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from finetune.infer import Engine

_REDRAW = 0.06  # seconds between two states of the page: a browser draws no faster, and each is sent whole


@dataclass(frozen=True)
class Turn:
    """A question, and the answer of each side."""

    question: str
    answers: tuple[str, ...]


@dataclass
class Side:
    """One model's answer so far.

    Attributes:
        model: of the engine's names.
        seen: token ids, the prompt's and the answer's.
        prompt_tokens: how many of them are the prompt's.
        times: seconds at each token of the answer.
    """

    model: str
    seen: list[int]
    prompt_tokens: int
    text: str
    times: list[float]
    end: FinishedEvent | None = None


def history(turns: Sequence[Turn], side: int, system: str | None) -> Conversation:
    """The conversation so far, as a side's model sees it."""
    return Conversation(system, [(turn.question, turn.answers[min(side, len(turn.answers) - 1)]) for turn in turns])


def requests_for(
    engine: Engine, turns: Sequence[Turn], question: str, models: Sequence[str], sampling: Sampling, system: str | None
) -> list[Request]:
    """A request for each side.

    Raises:
        DataError: as `request_for`.
    """
    return [
        request_for(engine, history(turns, side, system).messages(question), sampling, model)
        for side, model in enumerate(models)
    ]


def answered(answering: Answering, requests: Sequence[Request]) -> Iterator[list[Side]]:
    """Yields the sides while their answers arrive, no more often than a page is drawn; at the last, all have ended."""
    sides = [Side(str(request.model), list(request.ids), len(request.ids), "", []) for request in requests]
    drawn = 0.0
    # Closed here: on Python 3.12 the iterator of a loop outlives the generator around it when that is closed.
    with contextlib.closing(iter(answering)) as events:
        for number, event in events:
            side, now = sides[number], time.monotonic()
            side.text += event.text if side.text else event.text.lstrip()
            if isinstance(event, TokenEvent):
                side.seen.append(event.token)
                side.times.append(now)
            else:
                side.end = event
            if now - drawn >= _REDRAW:
                yield sides
                drawn = now
    yield sides


def summary(engine: Engine, side: Side) -> str:
    """The length of a side's answer, its speed, and why it ended if it did not end by itself."""
    said = [side.model, f"{side.prompt_tokens:,} + {len(side.seen) - side.prompt_tokens:,} tokens"]
    if len(side.times) > 1 and side.times[-1] > side.times[0]:
        said.append(f"{(len(side.times) - 1) / (side.times[-1] - side.times[0]):.1f} tokens/s")
    if side.end is None:
        return ", ".join(said)
    if side.end.error is not None:
        said.append(side.end.error.what)
    elif side.end.reason == "cancelled":
        said.append("stopped")
    elif is_full(engine, side.end):
        said.append(f"the model's maximum of {engine.max_length:,} tokens is reached")
    elif side.end.reason == "length":
        said.append("cut at max new tokens")
    return ", ".join(said)
