"""The page's own parts as HTML: a chat, and text coloured by each token's first expert.

Why not Gradio's chat: it takes a text for Markdown or for HTML, and a text is neither. Here all text goes through
templates that escape it, and characters that nobody would see are written out.

Colours are those of every page (`finetune.report`). Colour never stands alone: the number of an expert stands where it
changes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from jinja2 import Template

from finetune.chat.conversation import Messages
from finetune.chat.routes import Routed
from finetune.data import counts, split_unseen, visible
from finetune.report import environment, expert_looks


@dataclass(frozen=True)
class Token:
    """A token of the page.

    Attributes:
        stretches: its text in parts, each with whether it stands for what nobody would see.
        changes: whether the token before went to another expert.
    """

    stretches: list[tuple[str, bool]]
    number: int
    expert: int
    changes: bool


def chat_text(messages: Messages, note: str, *, label: str) -> str:
    """HTML of a conversation, with a line about its last answer."""
    said = [(message["role"], list(split_unseen(message["content"]))) for message in messages]
    return _template("chat.html.jinja").render(said=said, note=visible(note), label=visible(label))


def head(model: str) -> str:
    """HTML of the page's title."""
    return f'<header class="head"><h1>finetune chat</h1><p>{escape(visible(model))}</p></header>'


def refusal(text: str) -> str:
    """HTML of why something was not done."""
    return f'<p class="refused" role="alert">{escape(visible(text))}</p>'


def coloured_text(routed: Routed, layer: int, *, model: str) -> str:
    """HTML of a text at one layer, a `span` for each token."""
    first = routed.first[layer]
    tokens = [
        Token(list(split_unseen(piece)), number, expert, number == 0 or first[number - 1] != expert)
        for number, (piece, expert) in enumerate(zip(routed.pieces, first, strict=True))
    ]
    return _template("coloured.html.jinja").render(
        model=visible(model),
        layer=layer,
        tokens=tokens,
        looks=expert_looks(routed.experts),
        counted=counts(len(tokens), "token"),
    )


def legend(experts: int, texts: list[tuple[str, Routed]], layer: int) -> str:
    """HTML of the experts' colours, with how many tokens of each model's text went to each first."""
    loads = [(visible(model), Counter(routed.first[layer])) for model, routed in texts]
    return _template("legend.html.jinja").render(looks=expert_looks(experts), loads=loads, layer=layer)


def style_sheet() -> str:
    """The looks of the page."""
    return _template("page.css.jinja").render()


@cache
def _template(name: str) -> Template:
    return environment(Path(__file__).parent).get_template(name)
