"""A message's role and text: one rule for what is trained on, checked, served, chatted with and generated from.

Why: a conversation that is written one way in training and another way in serving is two conversations, and the model
has learnt to answer only one of them. How: whatever becomes a prompt or a training row takes its roles and texts from
here, and its tokens from `encoding.py`. Text parts are joined by a blank line and empty ones left out, as
mistral-common does it up to its tokenizer v13 (`instruct/normalize.py`, `_aggregate_content_chunks`); its v15 joins
them by nothing. Leaves out content other than text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.rows import Role, RowFault

# As clients and data sets write them; `developer` is OpenAI's newer name for what a template calls the system.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


class ContentFault(RowFault):
    """What is wrong with a message's content, `part` of it where it is a list, or `key` of that part."""

    def __init__(self, reason: str, part: int | None = None, key: str | None = None) -> None:
        super().__init__(reason)
        self.part, self.key = part, key


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of type text.

    Raises:
        ContentFault: it is something else; the texts are few, so that faults of many rows group.
    """
    if isinstance(content, list):
        texts = [_text_of_part(part, number) for number, part in enumerate(content)]
        content = "\n\n".join(text for text in texts if text)
    if not isinstance(content, str):
        raise ContentFault(f"the content of a turn is {kind(content)}, not a string")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: neither Arrow nor a tokenizer takes it
            raise ContentFault("the content of a turn is not valid Unicode (a lone surrogate)") from None
    return content


def _text_of_part(part: Any, number: int) -> str:
    if not isinstance(part, Mapping):
        reason = f"the content of a turn is a list with {kind(part)} in it, not a string or text parts"
        raise ContentFault(reason, number)
    if part.get("type") != "text":
        reason = f"the content of a turn has a part of type {shortened(part.get('type'))}; only text is taken"
        raise ContentFault(reason, number, "type")
    if not isinstance(part.get("text"), str):
        raise ContentFault(f"the text of a content part is {kind(part.get('text'))}, not a string", number, "text")
    return part["text"]


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "a mapping", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def shortened(value: Any) -> str:
    """A value in a message: a string in quotes, its beginning if it is long; of anything else what it is."""
    if not isinstance(value, str):
        return kind(value)
    return repr(value if len(value) <= 40 else value[:40] + "...")  # repr escapes what does not print
