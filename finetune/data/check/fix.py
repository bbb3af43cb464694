"""A corrected copy of a recipe's data: what can be corrected is, the rest is set apart, and both are counted.

Why: many sets have a handful of faults over and over, and a row is worth more corrected than refused. How: the turns of
a row are found as for training, every correction is one function over the list of turns, and the result passes the same
checks; a sound row comes back as it was. `DIR/<source>.jsonl` holds one {"messages": [...]} a line, beside whatever
else the row held, and equal conversations once; `DIR/refused.jsonl` what cannot be corrected, with where and why;
`DIR/fixes.json` the counts. Leaves out what would invent text or a role, and the data themselves, which stay untouched.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NotRequired, cast

from finetune.console import strict_json
from finetune.data.forms import check_conversation, role_of, unread_columns
from finetune.data.messages import besides, besides_of, is_said, text_of
from finetune.data.pipeline import Reading, form_of
from finetune.data.prepare import readings_of
from finetune.data.reading import Reader, rows_of
from finetune.data.rows import Message, RowFault
from finetune.data.selection import content_key
from finetune.data.sources import open_source
from finetune.data.turns import Form, Turn, turns_of
from finetune.disk import require_fresh, staged
from finetune.recipe import Recipe

_DUPLICATE = "an equal conversation came before"


def write_fixed(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes the corrected copy; the folder appears whole or not at all.

    Raises:
        OutputError: the folder holds something already.
        DataError: a source cannot be read.
    """
    require_fresh(folder)
    summary: dict[str, Any] = {}
    with staged(folder) as partial:
        with (partial / "refused.jsonl").open("w", encoding="utf-8") as refused:
            for number, reading in enumerate(readings_of(recipe)):
                name = f"{Path(reading.source.path).name.split('.')[0]}-{number}.jsonl"
                with (partial / name).open("w", encoding="utf-8") as fixed:
                    summary[name] = _fix(reading, fixed, refused)
        (partial / "fixes.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _fix(reading: Reading, fixed: IO[str], refused: IO[str]) -> dict[str, Any]:
    reader = open_source(reading.source)
    form = form_of(reader, reading)
    done: Counter[str] = Counter()
    rows = written = 0
    seen: set[bytes] = set()
    for chunk, _ in reader.chunks(0):
        for position, value in rows_of(chunk):
            rows += 1
            try:
                if isinstance(value, RowFault):
                    raise value
                conversation, fixes = repair(value, form)
                key = content_key(conversation)
                if key in seen:
                    raise RowFault(_DUPLICATE)
            except RowFault as fault:
                _refuse(refused, reader, position, fault, value)
                continue
            seen.add(key)
            done.update(fixes)
            tools = {"tools": conversation[0]["tools"]} if "tools" in conversation[0] else {}
            line = {**unread_columns(value, form), **tools, "messages": _plain(conversation)}
            fixed.write(json.dumps(line, ensure_ascii=False, default=repr) + "\n")
            written += 1
    return {"where": reader.where, "form": form.name, "rows": rows, "written": written, "fixes": dict(done)}


def _plain(conversation: list[Mended]) -> list[dict[str, Any]]:
    """Without `train` where it says nothing, and with the keys of turns that nobody reads."""
    return [
        {
            "role": turn["role"],
            "content": turn["content"],
            **besides(turn),
            **({} if turn["train"] else {"train": False}),
            **turn.get("unread", {}),
        }
        for turn in conversation
    ]


def _refuse(refused: IO[str], reader: Reader, position: int, fault: RowFault, value: Any) -> None:
    row = None if isinstance(value, RowFault) else strict_json(value)
    about = {"where": reader.locate(position), "reason": str(fault), "row": row}
    refused.write(json.dumps(about, default=repr) + "\n")


# ---- one row --------------------------------------------------------------------------------------------------------


_SURROGATE = re.compile("[\ud800-\udfff]")


class Mended(Message):
    """A turn as it is written again, with the keys of it that nobody reads."""

    unread: NotRequired[Mapping[str, Any]]


def repair(row: Any, form: Form) -> tuple[list[Mended], list[str]]:
    """The corrected conversation, and the corrections in the order in which they were made.

    Raises:
        RowFault: the row cannot be corrected.
    """
    done: list[str] = []
    turns = _without_null([turn._replace(role=role_of(turn.role, form)) for turn in turns_of(row, form)], done)
    conversation = [_mended_turn(turn, done) for turn in turns]
    tools = turns[0].tools if turns else None
    for correct in _CORRECTIONS:
        corrected = correct(conversation)
        if corrected != conversation:
            done.append(_NAMES[correct])
            conversation = corrected
    check_conversation(conversation)
    if tools:
        conversation[0]["tools"] = tools
    return conversation, list(dict.fromkeys(done))


# ---- turn by turn ---------------------------------------------------------------------------------------------------


def _without_null(turns: list[Turn], done: list[str]) -> list[Turn]:
    """Without turns that have no content, and what they answer or what answers them."""
    kept: list[Turn] = []
    orphaned = False  # the last turn was the user's, without content
    for turn in turns:
        if turn.content is None:
            done.append("turn without content dropped")
            if turn.role == "assistant" and kept and kept[-1].role == "user":
                kept.pop()
            orphaned = turn.role == "user"
        elif orphaned and turn.role == "assistant":
            orphaned = False
        else:
            kept.append(turn)
            orphaned = False
    return kept


def _mended_turn(turn: Turn, done: list[str]) -> Mended:
    mended: Mended = {"role": turn.role, "content": _text(turn.content, done), "train": turn.train}
    mended |= cast("Mended", besides_of(turn.besides or {}, turn.role))
    if turn.unread:
        mended["unread"] = turn.unread
    return mended


def _text(content: Any, done: list[str]) -> str:
    if isinstance(content, list):
        parts = [{**part, "text": _mended(part["text"], done)} if _has_text(part) else part for part in content]
        return text_of(parts)
    return text_of(_mended(content, done) if isinstance(content, str) else content)


def _has_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _mended(text: str, done: list[str]) -> str:
    if text.startswith("\ufeff"):
        done.append("byte order mark removed")
        text = text.lstrip("\ufeff")
    if _SURROGATE.search(text):
        done.append("lone surrogate replaced")
        # Two halves that belong together become their character; a half alone becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# ---- over the whole conversation ------------------------------------------------------------------------------------


def _system_first(messages: list[Mended]) -> list[Mended]:
    system = [message for message in messages if message["role"] == "system"]
    return [*system, *(message for message in messages if message["role"] != "system")]


def _joined(messages: list[Mended]) -> list[Mended]:
    runs = (list(run) for _, run in groupby(messages, key=lambda message: message["role"]))
    return [one for run in runs for one in (run if run[0]["role"] == "tool" else [_as_one(run)])]


def _as_one(run: list[Mended]) -> Mended:
    """Turns of one speaker as one; what is not supervised leaves all that it is joined to unsupervised."""
    if len(run) == 1:
        return run[0]
    unread = sorted({key for message in run for key in (*message.get("unread", {}), *besides(message))})
    if unread:
        raise RowFault(f"two {run[0]['role']} turns in a row, with {', '.join(f'`{key}`' for key in unread)}")
    texts = [message["content"] for message in run if message["content"].strip()]
    return {"role": run[0]["role"], "content": "\n\n".join(texts), "train": all(m["train"] for m in run)}


def _without_first_answer(messages: list[Mended]) -> list[Mended]:
    first = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first < len(messages) and messages[first]["role"] == "assistant":
        return messages[:first] + messages[first + 1 :]
    return messages


def _without_empty_end(messages: list[Mended]) -> list[Mended]:
    end = len(messages)
    while end and (
        messages[end - 1]["role"] in ("user", "tool")
        or (messages[end - 1]["role"] == "assistant" and not is_said(messages[end - 1]))
    ):
        end -= 1
    return messages[:end]


_NAMES: dict[Callable[[list[Mended]], list[Mended]], str] = {
    _system_first: "system message moved to the front",
    _joined: "turns of one role joined",
    _without_first_answer: "answer before the first question dropped",
    _without_empty_end: "unanswered end dropped",
}
_CORRECTIONS = tuple(_NAMES)
