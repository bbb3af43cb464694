"""One row of any known form to a checked list of messages, or the reason why not.

Why: a wrong role, a missing assistant turn or a content that is no string surfaces in the middle of training, if at
all. How: `to_messages` raises a `RowFault` whose text groups well ("role 'bot' is unknown"); `FaultLog` keeps the
positions per text, and turns them into one `DataError` that names every kind of fault with its rows. Leaves out tool
calls and content in parts, which the Mistral v1 format does not have. A user turn at the very end is kept: it is
context that nothing answers, and is not supervised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finetune.errors import DataError

Message = dict[str, str]
Form = Literal["messages", "chatml_text"]

ROLES = ("system", "user", "assistant")
COLUMN_OF: dict[Form, str] = {"messages": "messages", "chatml_text": "text"}
_ACCEPTED = "`messages` (a list of {role, content}) or `text` (ChatML: <|im_start|>role, newline, content, <|im_end|>)"
_CHATML_TURN = re.compile(r"\s*<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_POSITIONS_SHOWN = 8


class RowFault(Exception):
    """Why one row cannot be used; the text is the same for every row with the same fault."""


def find_form(row: Mapping[str, Any], wanted: Literal["auto", "messages", "chatml_text"], *, where: str) -> Form:
    """Decides from the first row how the rows are to be read.

    Raises:
        DataError: the column of the wanted form, or under `auto` of any form, is not there.
    """
    columns = ", ".join(row) or "none"
    if wanted != "auto":
        if COLUMN_OF[wanted] not in row:
            raise DataError(
                f"data.format {wanted} needs a column `{COLUMN_OF[wanted]}`; the columns are: {columns}",
                where=where,
                allowed=_ACCEPTED,
                fix="name the format that the data has, or rename the column",
            )
        return wanted
    if "messages" in row:
        return "messages"
    if isinstance(row.get("text"), str) and "<|im_start|>" in row["text"]:
        return "chatml_text"
    raise DataError(
        f"no column holds conversations; the columns are: {columns}",
        where=where,
        allowed=_ACCEPTED,
        fix="bring every row into the form {messages: [{role: user, content: ...}, {role: assistant, content: ...}]}",
    )


def to_messages(row: Mapping[str, Any], form: Form) -> list[Message]:
    """The messages of a row, reduced to role and content, after every check.

    Raises:
        RowFault: the row cannot be trained on.
    """
    column = COLUMN_OF[form]
    value = row.get(column)
    if value is None:
        raise RowFault(f"`{column}` is missing")
    turns = _parse_chatml(value) if form == "chatml_text" else _parse_messages(value)
    messages = [_checked_message(turn, number) for number, turn in enumerate(turns, start=1)]
    _check_order([message["role"] for message in messages])
    return messages


def _parse_messages(value: Any) -> Sequence[Any]:
    if isinstance(value, str):  # a CSV cell, or a column that holds JSON
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RowFault("`messages` is a string that is not JSON") from None
    if not isinstance(value, list):
        raise RowFault(f"`messages` is {_kind(value)}, not a list")
    if not value:
        raise RowFault("`messages` is empty")
    return value


def _parse_chatml(value: Any) -> Sequence[Message]:
    if not isinstance(value, str):
        raise RowFault(f"`text` is {_kind(value)}, not a string")
    turns: list[Message] = []
    position = 0
    while match := _CHATML_TURN.match(value, position):
        turns.append({"role": match[1].strip(), "content": match[2]})
        position = match.end()
    if not turns or position < len(value):
        raise RowFault("`text` is not ChatML from its beginning to its end")
    return turns


def _checked_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise RowFault(f"message {number} is not a mapping with `role` and `content`")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise RowFault(f"role {role!r} is unknown")
    if not isinstance(content, str):
        raise RowFault(f"content of message {number} is {_kind(content)}, not a string")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: neither Arrow nor a tokenizer takes it
        raise RowFault(f"content of message {number} is not valid Unicode (a lone surrogate)") from None
    return {"role": role, "content": content}


def _check_order(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise RowFault("no assistant turn, so nothing to learn")
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise RowFault(f"message {number + 1 + len(roles) - len(turns)} is of {role} where {expected} should speak")


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "a mapping", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class FaultLog:
    """Positions of faulty rows by fault, in the order in which the faults were met."""

    def __init__(self, unit: Literal["line", "row"]) -> None:
        self._unit = unit
        self._positions: dict[str, list[int]] = {}

    def add(self, position: int, fault: str) -> None:
        self._positions.setdefault(fault, []).append(position)

    def raise_if_any(self, *, rows: int, where: str) -> None:
        """Raises one DataError for all faults, if there are any; `rows` counts the rows read, faulty ones too."""
        if not self._positions:
            return
        faulty = sum(len(positions) for positions in self._positions.values())
        listing = [f"{self._list(positions)}: {fault}" for fault, positions in self._positions.items()]
        raise DataError(
            f"{faulty} of {rows} conversations cannot be trained on",
            where="\n    ".join([where, *listing]),
            allowed="roles system, user, assistant; one system message first or none, then user and assistant in turn; "
            "content a string",
            fix=f"correct or remove these {self._unit}s",
        )

    def _list(self, positions: list[int]) -> str:
        shown = ", ".join(str(position) for position in positions[:_POSITIONS_SHOWN])
        more = f" and {len(positions) - _POSITIONS_SHOWN} more" if len(positions) > _POSITIONS_SHOWN else ""
        return f"{self._unit}{'s' if len(positions) > 1 else ''} {shown}{more}"
