"""The page's conversation: one or two models answer the same questions, each continuing from its own answers.

Without gradio, so that it can be tested without a browser. A side that joins later continues from the first side's
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.chat.answering import Answer, request_for
from finetune.chat.conversation import Conversation
from finetune.infer import Request, Sampling

if TYPE_CHECKING:
    from finetune.infer import Engine


@dataclass(frozen=True)
class Turn:
    """A question, and the answer of each side."""

    question: str
    answers: tuple[str, ...]


def history(turns: Sequence[Turn], side: int, system: str | None) -> Conversation:
    """The conversation so far, as a side's model sees it."""
    return Conversation(system, [(turn.question, turn.answers[min(side, len(turn.answers) - 1)]) for turn in turns])


def requests_for(
    engine: Engine, turns: Sequence[Turn], question: str, models: Sequence[str], sampling: Sampling, system: str | None
) -> list[Request]:
    """A request for each side; raises as `request_for`."""
    return [
        request_for(engine, history(turns, side, system).messages(question), sampling, model)
        for side, model in enumerate(models)
    ]


def summary(engine: Engine, answer: Answer) -> str:
    """The model, the lengths of prompt and answer, and the answer's course."""
    said = [str(answer.request.model), f"{len(answer.request.ids):,} + {len(answer.tokens):,} tokens"]
    return ", ".join([*said, *answer.course(engine.max_length, starts_over="New conversation")])
