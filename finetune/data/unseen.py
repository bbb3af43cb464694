"""What rows hold and the model never sees: keys that no form reads, and text that a chat template leaves out.

Why: a flag that goes unread lets a model learn what was marked as bad, and text that goes unread is missing from the
answer; both trained without a word. How: whatever is neither read nor empty has a name here, and a report counts the
rows. A name that is usual for a label, an id or a source is mere metadata; any other that tells of text, of tools or of
what is to be learnt is a reason to look. Leaves out keys of content parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from finetune.data.messages import ROLES
from finetune.data.turns import Form, Turn

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
        return "nobody reads it, so what it marks is learnt all the same"
    return "the model never sees it"


def advice(name: str) -> str:
    """What to do about something that matters."""
    key = _key(name)
    if name.endswith(_TEMPLATE):
        return "choose a data.template that writes it, or take it out of the data"
    if _FLAG.search(key):
        if name.endswith("of turns"):
            return f"if 1 means that a turn is learnt, set data.columns.train: {key}; else take it out of the turns"
        return "take out of the data what is not to be learnt, or mark turns with `train`: 0, and remove the key"
    if key == "system":
        return "set data.columns.system: system if it is what the model is told first"
    return "put what the model is to read or write into the content of a message, or take the key out of the data"


def _key(name: str) -> str:
    return name.removesuffix(" of turns").strip("`")
