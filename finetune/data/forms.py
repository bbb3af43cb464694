"""One row to a checked conversation, or the reason why not; and what rows hold that nobody reads.

Why: a wrong role, a missing assistant turn or a content that is no string surfaces in the middle of training, if at
all; a key that nobody reads (a flag for a bad answer, say) never does. How: `to_conversation` checks one row and raises
a `RowFault`, whose text is the same for all rows with that fault, so that a report can group them; `parse` does a chunk
and never raises. Whatever a row holds besides is named and counted. Leaves out images. A user turn at the very end is
kept as context, not supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from finetune.data.messages import (
    ROLES,
    SYSTEM_COLUMNS,
    besides_of,
    flow,
    is_said,
    kind,
    require_calls,
    shortened,
    text_of,
)
from finetune.data.reading import rows_of
from finetune.data.rows import Conversation, Message, Parsed, RawChunk, Role, RowFault
from finetune.data.turns import Form, Turn, turns_of

_NAMED = 40  # characters of a role that is shown whole


# ---- one row, one chunk ---------------------------------------------------------------------------------------------


def to_conversation(row: Any, form: Form) -> Conversation:
    """The conversation of a row, after every check.

    Raises:
        RowFault: the row cannot be trained on.
    """
    return _checked(turns_of(row, form), form)


def _checked(turns: list[Turn], form: Form) -> Conversation:
    conversation = [_message(turn, form) for turn in turns]
    check_conversation(conversation)
    return conversation


def parse(chunk: RawChunk, form: Form) -> Parsed:
    """Every row of a chunk, used or refused with its reason."""
    parsed = Parsed([], [], [], {})
    for position, row in rows_of(chunk):
        try:
            if isinstance(row, RowFault):
                parsed.refused.append((position, str(row)))
                continue
            turns = turns_of(row, form)
            conversation = _checked(turns, form)
        except RowFault as fault:
            parsed.refused.append((position, str(fault)))
        else:
            parsed.conversations.append(conversation)
            parsed.positions.append(position)
            for name in unseen_in(row, form, turns):
                parsed.unseen.setdefault(name, []).append(position)
    return parsed


def _message(turn: Turn, form: Form) -> Message:
    message: Message = {"role": role_of(turn.role, form), "content": text_of(turn.content), "train": turn.train}
    if turn.besides:
        message |= cast("Message", besides_of(turn.besides, message["role"]))
    if turn.tools:
        message["tools"] = turn.tools
    return message


def role_of(role: Any, form: Form) -> Role:
    if not isinstance(role, str):
        raise RowFault(f"a role is {kind(role)}, not a string")
    known = form.known_role(role)
    if known is None:
        says = f"; if it is the user's, set data.roles: {flow({role: 'user'})}" if len(role) <= _NAMED else ""
        raise RowFault(f"role {shortened(role)} is unknown{says}")
    return known


def check_conversation(conversation: Sequence[Message]) -> None:
    """Roles in turn, after at most one system message, and something to learn.

    Raises:
        RowFault: one of these does not hold.
    """
    require_calls(conversation)
    before, answers = "", []
    for message in conversation:
        role = message["role"]
        if role == "system" and before:
            raise RowFault("a system message that is not the first turn")
        if role == "assistant" and before in ("", "system"):
            raise RowFault("the assistant speaks first")
        if role == before and role != "tool":
            raise RowFault(f"two {role} turns in a row")
        if role == "assistant":
            answers.append(message)
        before = role
    if not answers:
        raise RowFault("no assistant turn, so nothing to learn")
    if not any(map(is_said, answers)):
        raise RowFault("every assistant turn is empty")


# ---- what rows hold and the model never sees ------------------------------------------------------------------------


_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
_TEXT = re.compile(
    r"reason|think|thought|rationale|cot$|chain|tool|function|image|video|audio|media|attachment|document|context|"
    r"system|instruct|input|output|history|prompt|response|completion|answer|question|chosen|rejected|content|message|"
    r"conversation|refusal|prefix|prefill",
    re.IGNORECASE,
)
_FLAG = re.compile(r"mask|loss|train|weight|learn|supervis|^labels?$", re.IGNORECASE)
_METADATA = re.compile(
    r"(^|_)(id|idx|index|uuid|hash|count|length|len|tokens|type|name|source|lang|language)s?$", re.IGNORECASE
)
_LONGEST = 60  # characters of a name; a row may be keyed by anything
_TEMPLATE = "which the chat template leaves out"
_SPACE = "white space"


def unread_columns(row: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """The columns of a row that the form does not read and that are not empty."""
    if len(row) == 1:
        return {}
    return {str(name): value for name, value in row.items() if name not in form.read and value not in _EMPTY}


def unseen_in(row: Mapping[str, Any], form: Form, turns: Sequence[Turn]) -> Iterator[str]:
    """Names of what is unread in a row, each once; a text that a turn says besides is not missing."""
    for name, value in unread_columns(row, form).items():
        if not (isinstance(value, str) and matters(name) and any(_says(turn, value) for turn in turns)):
            yield f"`{name[:_LONGEST]}`"
    yield from {f"`{name[:_LONGEST]}` of turns" for turn in turns if turn.unread for name in turn.unread}


def _says(turn: Turn, text: str) -> bool:
    return isinstance(turn.content, str) and text.strip() in turn.content


def cut_from(role: str, text: str, rendered: str) -> str | None:
    """The name of what the template leaves out of a message, if it does; `role` may be a key of assistant messages."""
    if text in rendered or role == "tool":  # templates read what a tool answers as JSON and write it anew
        return None
    what = f"text of {role} messages" if role in ROLES else f"`{role}` of turns"
    return template_leaves_out(f"{_SPACE} around the {what}" if text.strip() in rendered else what)


def template_leaves_out(what: str) -> str:
    return f"{what}, {_TEMPLATE}"


@lru_cache(maxsize=4096)
def matters(name: str) -> bool:
    """Whether it is more than metadata."""
    if name.endswith(_TEMPLATE):
        return not name.startswith(_SPACE)
    key = _key(name)
    return _METADATA.search(key) is None and (_TEXT.search(key) is not None or _FLAG.search(key) is not None)


def danger(name: str) -> str:
    """What it means that nobody reads it."""
    if _FLAG.search(_key(name)) and not name.endswith(_TEMPLATE):
        return "nobody reads it, so what it marks is trained on all the same"
    return "the model never sees it"


def advice(name: str) -> str:
    """What to do about something that matters."""
    key = _key(name)
    if name.endswith(_TEMPLATE):
        return "choose a data.template that writes it, or take it out of the data"
    if _FLAG.search(key):
        if name.endswith("of turns"):
            return f"if 1 means that a turn is trained on, set data.columns.train: {key}; else take it out of the turns"
        return "take out of the data what should not be trained on, or mark turns with `train`: 0, and remove the key"
    if key in SYSTEM_COLUMNS:
        return f"set data.columns.system: {key} if it is what the model is told first"
    return "put what the model is to read or write into the content of a message, or take the key out of the data"


def _key(name: str) -> str:
    return name.removesuffix(" of turns").strip("`")
