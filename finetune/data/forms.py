"""Which form a source's rows have, and one row to a checked conversation, or the reason why not.

Why: a wrong role, a missing assistant turn or a content that is no string surfaces in the middle of training, if at
all; a key that nobody reads (a flag for a bad answer, say) never does. How: `find_form` decides once per source, from a
sample row and what the user said; `to_conversation` checks one row and raises a `RowFault`, whose text is the same for
all rows with that fault, so that a report can group them; `parse` does a chunk and never raises. Whatever a row holds
besides is named and counted. Leaves out images. A user turn at the very end is kept as context, not supervised.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

from finetune.data.messages import ROLES, besides_of, decoded, is_said, kind, require_calls, shortened, text_of
from finetune.data.reading import rows_of
from finetune.data.rows import Conversation, Message, Parsed, RawChunk, Role, RowFault
from finetune.data.turns import Form, FormName, Turn, listed, text_form, turns_of
from finetune.errors import DataError

__all__ = ["Form", "FormName", "find_form", "parse", "to_conversation"]

# What data sets call the speakers, whatever the case; what the user says in data.roles comes first.
_USUAL_ROLES: Mapping[str, Role] = {
    **ROLES,
    **dict.fromkeys(("human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "bing", "bard", "ai", "answer", "response"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
}
_NAMED = 40  # characters of a role that is shown whole
_OURS = ("system", "user", "assistant", "tool")
_TURN_KEYS = {"role", "content", "train"}
_LISTS = ("messages", "conversations", "conversation")  # names in use for the column with the turns
_REQUIRED: dict[FormName, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "chatml_text": ("text",),
    "inst_text": ("text",),
    "human_text": ("text",),
}
_OPTIONAL: dict[FormName, dict[str, str | None]] = {  # with the user's name if he gives none; None: not looked for
    "messages": {"role": "role", "content": "content", "tools": "tools", "train": None, "system": None},
    "sharegpt": {"role": "from", "content": "value", "tools": "tools", "train": None, "system": "system"},
    "prompt_completion": {"role": "role", "content": "content", "tools": "tools", "train": None, "system": None},
    "alpaca": {"input": "input", "system": "system", "history": "history"},
    "chatml_text": {},
    "inst_text": {},
    "human_text": {},
}
COLUMNS = sorted(
    {*_TURN_KEYS, *(c for names in _REQUIRED.values() for c in names), "input", "system", "history", "tools"}
)
_ACCEPTED = (
    "`messages` (a list of {role, content}), `conversations` (ShareGPT: a list of {from, value}), `prompt` and "
    "`completion`, `instruction`, `input` and `output` (Alpaca), or `text` in ChatML (<|im_start|>role, newline, "
    "content, <|im_end|>), as `<s>[INST] ... [/INST] ...</s>` or as `### Human: ...### Assistant: ...`"
)


# ---- which form -----------------------------------------------------------------------------------------------------


def find_form(
    row: Mapping[str, Any],
    wanted: FormName | Literal["auto"],
    *,
    columns: Mapping[str, str],
    roles: Mapping[str, str],
    where: str,
) -> Form:
    """Decides from a sample row how the rows are to be read.

    Args:
        row: a row with every column that the rows have (`sample_row`).
        wanted: the form, or `auto` to recognize it.
        columns: our name of a column, or of a key of a turn, to the user's.
        roles: the user's role names to ours.
        where: the source, for messages.

    Raises:
        DataError: the columns are not those of the form, or of any, or a name in `columns` or `roles` means nothing.
    """
    _check_names(columns, roles, where=where)
    name = _recognized(row, columns, where=where) if wanted == "auto" else wanted
    used = {column: _own_name(column, row, columns, name) for column in _REQUIRED[name]}
    used |= {column: default for column, default in _OPTIONAL[name].items() if default is not None}
    for column, own in columns.items():
        if column not in _REQUIRED[name] and column not in _OPTIONAL[name]:
            raise DataError(
                f"data.columns.{column} means nothing in the form {name}",
                where=where,
                allowed=", ".join([*_REQUIRED[name], *_OPTIONAL[name]]),
                fix="remove it, or set data.format to the form that has it",
            )
        used[column] = own
    for column in {*columns, *_REQUIRED[name]} - _TURN_KEYS:
        if used[column] not in row:
            raise _missing_column(name, used[column], row, where=where)
    return Form(name, used, {**_USUAL_ROLES, **cast("Mapping[str, Role]", roles)})


def _recognized(row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> FormName:
    for column in (columns["messages"],) if "messages" in columns else _LISTS:
        keys = _first_turn(row.get(column)).keys()
        if "role" in keys:
            return "messages"
        if columns.get("role", "from") in keys:
            return "sharegpt"
    if columns.get("messages", "messages") in row:
        return "messages"
    table_forms: tuple[FormName, ...] = ("prompt_completion", "alpaca")
    for form in table_forms:
        if all(columns.get(column, column) in row for column in _REQUIRED[form]):
            return form
    text = row.get(columns.get("text", "text"))
    if isinstance(text, str) and (form_of_text := text_form(text)) is not None:
        return form_of_text
    raise _no_conversations(row, where=where, plain_text=isinstance(text, str))


def _first_turn(value: Any) -> Mapping[str, Any]:
    try:
        value = listed(decoded(value, "it is"))
    except RowFault:
        return {}
    return value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}


def _own_name(column: str, row: Mapping[str, Any], columns: Mapping[str, str], form: FormName) -> str:
    if column in columns or column != "messages":
        return columns.get(column, column)
    names = _LISTS if form == "messages" else ("conversations", "conversation", "messages")
    role = columns.get("role", "role" if form == "messages" else "from")
    with_turns = [name for name in names if role in _first_turn(row.get(name))]
    return next(iter([*with_turns, *(name for name in names if name in row)]), names[0])


def _check_names(columns: Mapping[str, str], roles: Mapping[str, str], *, where: str) -> None:
    for section, names, known in (("columns", columns.keys(), COLUMNS), ("roles", roles.values(), _OURS)):
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise DataError(
                    f"data.{section}: there is no {section[:-1]} {name!r} of ours",
                    where=where,
                    allowed=", ".join(known),
                    fix=f"did you mean {near[0]!r}?"
                    if near
                    else "data.columns maps our name to yours, data.roles yours to ours",
                )


def _missing_column(form: FormName, column: str, row: Mapping[str, Any], *, where: str) -> DataError:
    near = difflib.get_close_matches(column, [str(name) for name in row], n=1)
    return DataError(
        f"data.format {form} needs a column `{column}`; the columns are: {_names(row)}",
        where=where,
        allowed=_ACCEPTED,
        fix=f"did you mean `{near[0]}`? Name it in data.columns"
        if near
        else "name the format that the data has, or your columns in data.columns",
    )


def _no_conversations(row: Mapping[str, Any], *, where: str, plain_text: bool) -> DataError:
    what = f"no column holds conversations; the columns are: {_names(row)}"
    fix = (
        "name your columns in data.columns, or bring every row into the form "
        "{messages: [{role: user, content: ...}, {role: assistant, content: ...}]}"
    )
    if {"chosen", "rejected"} <= row.keys():
        what += "; pairs of a chosen and a rejected answer are for training on preferences, which is not done here"
        column = "completion" if isinstance(row["chosen"], str) else "messages"
        fix = f"to train on the chosen answers alone, set data.columns: {{{column}: chosen}}"
    elif plain_text:
        what += "; `text` is plain text, and pretraining on it is not done here"
        fix += ", with what the model should write as the answer"
    return DataError(what, where=where, allowed=_ACCEPTED, fix=fix)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in row) or "none"


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
        own = role if role.isidentifier() else json.dumps(role)
        says = f"; if it is the user's, set data.roles: {{{own}: user}}" if len(role) <= _NAMED else ""
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
    return {str(name): row[name] for name in row.keys() - form.read if row[name] not in _EMPTY}


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
    if key == "system":
        return "set data.columns.system: system if it is what the model is told first"
    return "put what the model is to read or write into the content of a message, or take the key out of the data"


def _key(name: str) -> str:
    return name.removesuffix(" of turns").strip("`")
