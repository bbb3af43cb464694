"""Which form a source's rows have, from a sample row and what the recipe says about its columns and roles.

Why: most sets are one of a few layouts under names that differ, and whoever has `question` and `answer` should not need
to know ours. How: a list of turns is known by the keys of its first turn, a text by its marks, a table by the names of
its columns, ours first and then those in use for the same (`question`, `answer`, `context`, whatever the case). Where
two columns could be the answer, nobody guesses. Every refusal ends with the line of the recipe that settles it, written
with the names of that very source.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from finetune.data.messages import ROLES, SYSTEM_COLUMNS, decoded, flow
from finetune.data.rows import Role, RowFault
from finetune.data.turns import Form, FormName, listed, text_form
from finetune.errors import DataError

# What data sets call the speakers, whatever the case; what the user says in data.roles comes first.
_USUAL_ROLES: Mapping[str, Role] = {
    **ROLES,
    **dict.fromkeys(("human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "bing", "bard", "ai", "answer", "response"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
}
_OURS = ("system", "user", "assistant", "tool")
_TURN_KEYS = {"role", "content", "train"}
_LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")  # columns with the turns
# Names in use for what is asked, what is answered, and what a question refers to; any case, after those of the forms.
_ASKED = ("prompt", "instruction", "question", "query", "problem", "user", "human", "input", "inputs")
_ANSWERED = ("completion", "output", "answer", "response", "solution", "reply", "assistant", "target", "targets")
_REFERRED = ("input", "context")
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
_COLUMNS = sorted(
    {*_TURN_KEYS, *(c for names in _REQUIRED.values() for c in names), "input", "system", "history", "tools"}
)
_ACCEPTED = (
    "`messages` (a list of {role, content}), `conversations` (ShareGPT: a list of {from, value}), `prompt` and "
    "`completion`, `question` and `answer`, `instruction`, `input` and `output` (Alpaca), or `text` in ChatML "
    "(<|im_start|>role, newline, content, <|im_end|>), as `<s>[INST] ... [/INST] ...</s>` or as "
    "`### Human: ...### Assistant: ...`"
)


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
    _check_columns(columns, row, where=where)
    _check_roles(roles, row, columns, where=where)
    name, found = _recognized(row, columns, where=where) if wanted == "auto" else (wanted, {})
    if wanted in ("prompt_completion", "alpaca") and any(columns.get(c, c) not in row for c in _REQUIRED[wanted]):
        pair = _pair_in(row, columns, where=where)
        found = {} if pair is None else pair.columns(wanted)
    columns = {**found, **columns}
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
    for column in _REQUIRED[name]:
        if used[column] not in row:
            raise _missing_column(name, column, used[column], row, columns, where=where)
    return Form(name, used, {**_USUAL_ROLES, **cast("Mapping[str, Role]", roles)})


def _recognized(row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> tuple[FormName, dict[str, str]]:
    """The form, and our names of columns that go by another name in use."""
    for column in (columns["messages"],) if "messages" in columns else _LISTS:
        keys = _first_turn(row.get(column)).keys()
        if "role" in keys:
            return "messages", {}
        if columns.get("role", "from") in keys:
            return "sharegpt", {}
    if columns.get("messages", "messages") in row:
        return "messages", {}
    table_forms: tuple[FormName, ...] = ("prompt_completion", "alpaca")
    for form in table_forms:
        if all(columns.get(column, column) in row for column in _REQUIRED[form]):
            return form, {}
    text = row.get(columns.get("text", "text"))
    if isinstance(text, str) and (form_of_text := text_form(text)) is not None:
        return form_of_text, {}
    if (pair := _pair_in(row, columns, where=where)) is not None:
        alpaca = {"instruction", "output", "input", "history"} & columns.keys()
        prompts = {"prompt", "completion", "tools"} & columns.keys()
        chosen: FormName = "alpaca" if alpaca or (pair.referred and not prompts) else "prompt_completion"
        return chosen, pair.columns(chosen)
    raise _no_conversations(row, columns, where=where, plain_text=isinstance(text, str))


def _first_turn(value: Any) -> Mapping[str, Any]:
    try:
        value = listed(decoded(value, "it is"))
    except RowFault:
        return {}
    return value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}


def _own_name(column: str, row: Mapping[str, Any], columns: Mapping[str, str], form: FormName) -> str:
    if column in columns or column != "messages":
        return columns.get(column, column)
    names = _LISTS if form == "messages" else ("conversations", "conversation", "messages", *_LISTS[3:])
    role = columns.get("role", "role" if form == "messages" else "from")
    with_turns = [name for name in names if role in _first_turn(row.get(name))]
    return next(iter([*with_turns, *(name for name in names if name in row)]), names[0])


# ---- a question and its answer in two columns -----------------------------------------------------------------------


class _Pair(NamedTuple):
    """The user's columns of a question, of its answer, of what the question refers to, and of a system prompt."""

    asked: str
    answered: str
    referred: str | None
    system: str | None

    def columns(self, form: FormName) -> dict[str, str]:
        asked, answered = _REQUIRED[form]
        found = {asked: self.asked, answered: self.answered}
        if self.referred and form == "alpaca":
            found["input"] = self.referred
        return found | ({"system": self.system} if self.system else {})


def _pair_in(row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> _Pair | None:
    """The columns by the names in use; those that the recipe names come first.

    Raises:
        DataError: several columns could be the question, or the answer.
    """
    asked, answered = _candidates(row, columns)
    if not asked or not answered:
        return None
    if len(asked) > 1 or len(answered) > 1:
        several, what = (answered, "answer") if len(answered) > 1 else (asked, "question")
        raise DataError(
            f"{' and '.join(f'`{name}`' for name in several)} could each be the {what}",
            where=where,
            fix=f"say which it is: set data.columns: {flow({'prompt': asked[0], 'completion': answered[0]})}",
        )
    texts = _texts(row, {*columns.values(), *asked, *answered})
    referred = columns.get("input") or next((texts[name] for name in _REFERRED if name in texts), None)
    return _Pair(asked[0], answered[0], referred, next((texts[n] for n in SYSTEM_COLUMNS if n in texts), None))


def _candidates(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    texts = _texts(row, set(columns.values()))
    found = []
    for ours, names in ((("prompt", "instruction"), _ASKED), (("completion", "output"), _ANSWERED)):
        named = [columns[name] for name in ours if name in columns]
        found.append(named or [texts[name] for name in names if name in texts])
    asked = [name for name in found[0] if _folded(name) not in _REFERRED] or found[0]
    return asked, found[1]


def _texts(row: Mapping[str, Any], taken: set[str]) -> dict[str, str]:
    """Columns of text that nothing has taken, by their names in small letters."""
    return {_folded(name): name for name, value in row.items() if isinstance(value, str) and name not in taken}


def _folded(name: str) -> str:
    return "_".join(str(name).lower().split())


# ---- what is wrong, and the line that settles it --------------------------------------------------------------------


def _check_columns(columns: Mapping[str, str], row: Mapping[str, Any], *, where: str) -> None:
    if any(_is_swapped(*pair, row) for pair in columns.items()):
        right = dict((own, ours) if _is_swapped(ours, own, row) else (ours, own) for ours, own in columns.items())
        raise DataError(
            "data.columns is written the other way round: our name comes first, then the name of your column",
            where=where,
            allowed=f"our names: {', '.join(_COLUMNS)}",
            fix=f"write data.columns: {flow(right)}",
        )
    for ours, own in columns.items():
        if ours not in _COLUMNS:
            near = difflib.get_close_matches(ours, _COLUMNS, n=1)
            right = {near[0] if near and name == ours else name: column for name, column in columns.items()}
            raise DataError(
                f"data.columns: our name of a column comes first, then yours, and {ours!r} is no name of ours",
                where=where,
                allowed=f"our names: {', '.join(_COLUMNS)}",
                fix=f"write data.columns: {flow(right if near else _example(row, {}) or {'messages': own})}",
            )
        if ours not in _TURN_KEYS and own not in row:
            near = difflib.get_close_matches(own, [str(name) for name in row], n=1)
            right = {**columns, ours: near[0]} if near else _example(row, {}) or {ours: next(iter(row), "text")}
            raise DataError(
                f"data.columns.{ours} needs a column `{own}`; the columns are: {_names(row)}",
                where=where,
                fix=(f"did you mean `{near[0]}`? " if near else "") + f"write data.columns: {flow(right)}",
            )


def _is_swapped(ours: str, own: str, row: Mapping[str, Any]) -> bool:
    """Whether the user's name seems to stand first, and ours after it."""
    if ours in _COLUMNS:
        return own in _COLUMNS and own not in _TURN_KEYS and ours in row and own not in row
    return own in _COLUMNS and (ours in row or own not in row)


def _check_roles(roles: Mapping[str, str], row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> None:
    wrong = [ours for ours in roles.values() if ours not in _OURS]
    if not wrong:
        return
    if all(own in _OURS for own, ours in roles.items() if ours not in _OURS):
        right = {ours: own for own, ours in roles.items()}
        what = "data.roles is written the other way round: the role in your data comes first, then ours"
    else:
        near = {ours: difflib.get_close_matches(ours, _OURS, n=1) for ours in wrong}
        right = {own: (near.get(ours) or [ours if ours in _OURS else "user"])[0] for own, ours in roles.items()}
        what = f"data.roles says what each role in your data is here, and {wrong[0]!r} is no role of ours"
    raise DataError(what, where=where, allowed=", ".join(_OURS), fix=f"write data.roles: {flow(right)}")


def _missing_column(
    form: FormName, ours: str, column: str, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str
) -> DataError:
    near = difflib.get_close_matches(column, [str(name) for name in row], n=1)
    return DataError(
        f"data.format {form} needs a column `{column}`; the columns are: {_names(row)}",
        where=where,
        allowed=_ACCEPTED,
        fix=f"did you mean `{near[0]}`? Set data.columns: {flow({**columns, ours: near[0]})}"
        if near
        else "name the format that the data has (data.format: auto looks for it), or your columns in data.columns",
    )


def _no_conversations(row: Mapping[str, Any], columns: Mapping[str, str], *, where: str, plain_text: bool) -> DataError:
    what = f"no column holds conversations; the columns are: {_names(row)}"
    form = "{messages: [{role: user, content: ...}, {role: assistant, content: ...}]}"
    fix = f"name your columns in data.columns, or bring every row into the form {form}"
    if {"chosen", "rejected"} <= row.keys():
        what += "; pairs of a chosen and a rejected answer are for training on preferences, which is not done here"
        column = "completion" if isinstance(row["chosen"], str) else "messages"
        fix = f"to train on the chosen answers alone, set data.columns: {{{column}: chosen}}"
    elif plain_text:
        what += "; `text` is plain text, and pretraining on it is not done here"
        fix += ", with what the model should write as the answer"
    elif example := _example(row, columns):
        fix = (
            f"name the columns with question and answer: data.columns: {flow(example)}, or bring every row into the "
            f"form {form}"
        )
    return DataError(what, where=where, allowed=_ACCEPTED, fix=fix)


def _example(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """A line for data.columns out of the row's own names; empty where it has not two texts."""
    asked, answered = _candidates(row, columns)
    others = [str(n) for n, v in row.items() if isinstance(v, str) and n not in (*asked[:1], *answered[:1])]
    first = [*asked[:1], *([] if asked else others[:1])]
    second = [*answered[:1], *([] if answered else [name for name in others if name not in first][:1])]
    return {"prompt": first[0], "completion": second[0]} if first and second else {}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in row) or "none"
