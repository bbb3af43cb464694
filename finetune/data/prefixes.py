"""The assistant's spans in the output of a template that does not mark them, where they can be proven.

Why: the templates that models bring along have no `{% generation %}` markers. How: the conversation up to an assistant
turn, with the generation prompt, is what the model is given to answer; the conversation with that turn is what it
should have become. Where the first is the beginning of the second, and the second of the whole, the turn is what lies
between. A template for which that does not hold is refused, and so is one that writes a header before the answer but
leaves it out of the generation prompt: the header would be learnt, and be missing when the model is asked. The spans
are those of TRL's marked versions of the same templates, where TRL's begin after the generation prompt. Space that a
template writes after the token that ends a turn belongs to the span here; `rendering.py` takes it off.
"""

from __future__ import annotations

from typing import Protocol

from finetune.data.rows import Turns

Spans = list[tuple[int, int]]
HARMLESS = "\ue000"  # a private character, which no template looks for


class TemplateRefusal(Exception):
    """The template does not take a conversation, or it cannot be told what in its output is whose."""


class Render(Protocol):
    """Messages to text."""

    def __call__(self, messages: Turns, add_generation_prompt: bool, /) -> str: ...


def derive_spans(render: Render, messages: Turns, whole: str) -> Spans:
    """[start, end) in `whole`, the rendered conversation, of every assistant turn.

    Raises:
        TemplateRefusal: what an assistant turn wrote cannot be proven.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(messages[:number], True), render(messages[: number + 1], False)
        if not answered.startswith(asked):
            raise _unproven(number, "its prompt is not how the conversation with the answer begins")
        if not whole.startswith(answered):
            raise _unproven(number, "what comes after it changes how it is written")
        if asked == render(messages[:number], False):
            header = _header(render, messages[: number + 1], asked)
            if header:
                raise _unproven(number, f"{header!r} stands before the answer and is not in the generation prompt")
        spans.append((len(asked), len(answered)))
    return spans


def _header(render: Render, messages: Turns, asked: str) -> str:
    """What the template writes before the text of the last message, besides spaces."""
    alike = render([*messages[:-1], {**messages[-1], "content": HARMLESS}], False)
    return alike.partition(HARMLESS)[0][len(asked) :].strip()


def _unproven(number: int, why: str) -> TemplateRefusal:
    return TemplateRefusal(
        "the chat template has no generation markers, and what the assistant says in message "
        f"{number + 1} cannot be told from the prompt: {why}"
    )
