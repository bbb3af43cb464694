"""The corrected copy of a recipe's data, and what is corrected in one row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.data.check.fix import repair, write_fixed
from finetune.data.forms import to_conversation
from finetune.data.recognition import find_form
from finetune.data.rows import RowFault
from finetune.data.turns import Form
from tests.data.check.conftest import turns


def test_every_row_is_mended_or_set_apart(make_recipe, tmp_path):
    good = turns("q", "a")
    twice = {"messages": [{"role": "user", "content": "one"}, *turns("two", "answer")["messages"]]}
    unanswered = turns("q2", "a2", "and?")
    rows = [good, twice, "{", turns("only a question"), good, unanswered]
    recipe = make_recipe(rows)
    folder = tmp_path / "fixed"
    summary = write_fixed(recipe, folder)
    lines = [json.loads(line) for line in (folder / "train-0.jsonl").read_text(encoding="utf-8").splitlines()]
    refused = [json.loads(line) for line in (folder / "refused.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [good, turns("one\n\ntwo", "answer"), turns("q2", "a2")]
    assert [row["where"] for row in refused] == [f"train.jsonl line {line}" for line in (3, 4, 5)]
    assert refused[2]["reason"] == "an equal conversation came before"
    about = summary["train-0.jsonl"]
    assert (about["rows"], about["written"]) == (6, 3)
    assert sum(about["fixes"].values()) == 2
    assert json.loads((folder / "fixes.json").read_text(encoding="utf-8")) == summary


def test_turns_that_are_not_learnt_stay_so(make_recipe, tmp_path):
    row = turns("q", "a", "r", "b")
    row["messages"][1]["train"] = False
    write_fixed(make_recipe([row]), tmp_path / "fixed")
    assert json.loads((tmp_path / "fixed" / "train-0.jsonl").read_text(encoding="utf-8")) == row


def test_what_nobody_reads_is_kept_or_set_apart(make_recipe, tmp_path):
    row = {"id": 7, "tools": [{"type": "function", "function": {"name": "wx"}}], **turns("q", "a")}
    row["messages"][1] |= {"thinking": "Hm.", "train": False}
    twice = {"messages": [{"role": "user", "content": "one", "name": "Eve"}, *turns("two", "answer")["messages"]]}
    write_fixed(make_recipe([row, twice]), tmp_path / "fixed")
    assert json.loads((tmp_path / "fixed" / "train-0.jsonl").read_text(encoding="utf-8")) == row
    [refused] = (tmp_path / "fixed" / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(refused)["reason"] == "two user turns in a row, with `name`"


MESSAGES = find_form({"messages": [{"role": "user", "content": "a"}]}, "auto", columns={}, roles={}, where="here")
SHORT = {"s": "system", "u": "user", "a": "assistant"}


def as_turns(*spoken: tuple[str, Any]) -> list[dict[str, Any]]:
    """Turns from (role, content); s, u and a stand for the roles."""
    return [{"role": SHORT.get(role, role), "content": content} for role, content in spoken]


def repaired(*spoken: tuple[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    conversation, done = repair({"messages": as_turns(*spoken)}, MESSAGES)
    letter = {role: short for short, role in SHORT.items()}
    return [(letter[message["role"]], message["content"]) for message in conversation], done


SOUND = (("s", " S "), ("u", "a\x00"), ("a", ""), ("u", "\n"), ("a", "b"))


@pytest.mark.parametrize(
    ("spoken", "expected", "done"),
    [
        (SOUND, SOUND, []),
        ([("u", "a"), ("u", "b"), ("a", "c")], [("u", "a\n\nb"), ("a", "c")], ["turns of one role joined"]),
        ([("u", "a"), ("a", ""), ("a", "c")], [("u", "a"), ("a", "c")], ["turns of one role joined"]),
        (
            [("a", "Hello!"), ("u", "a"), ("a", "b")],
            [("u", "a"), ("a", "b")],
            ["answer before the first question dropped"],
        ),
        (
            [("s", "S"), ("a", "Hello!"), ("a", "?"), ("u", "a"), ("a", "b")],
            [("s", "S"), ("u", "a"), ("a", "b")],
            ["turns of one role joined", "answer before the first question dropped"],
        ),
        ([("u", "a"), ("a", "b"), ("u", "c")], [("u", "a"), ("a", "b")], ["unanswered end dropped"]),
        ([("u", "a"), ("a", "b"), ("u", "c"), ("a", " ")], [("u", "a"), ("a", "b")], ["unanswered end dropped"]),
        (
            [("u", "a"), ("s", "S"), ("a", "b"), ("s", "T"), ("u", "c"), ("a", "d")],
            [("s", "S\n\nT"), ("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")],
            ["system message moved to the front", "turns of one role joined"],
        ),
        (
            [("Human", "a"), ("Assistant ", "b"), ("prompter", "c"), ("GPT", "d")],
            [("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")],
            [],
        ),
        (
            [("u", "x\ud83dy \ude00"), ("a", "b\udfff")],
            [("u", "x\ufffdy \ufffd"), ("a", "b\ufffd")],
            ["lone surrogate replaced"],
        ),
        ([("u", "\ud83d\ude00"), ("a", "b")], [("u", "😀"), ("a", "b")], ["lone surrogate replaced"]),
        ([("u", "\ufeffa"), ("a", "b")], [("u", "a"), ("a", "b")], ["byte order mark removed"]),
        (
            [("u", [{"type": "text", "text": "\ufeffa"}]), ("a", "b")],
            [("u", "a"), ("a", "b")],
            ["byte order mark removed"],
        ),
        (
            [("u", "a"), ("a", None), ("u", "c"), ("a", "d")],
            [("u", "c"), ("a", "d")],
            ["turn without content dropped"],
        ),
        (
            [("u", "a"), ("a", "b"), ("u", None), ("a", "d")],
            [("u", "a"), ("a", "b")],
            ["turn without content dropped"],
        ),
        ([("s", None), ("u", "a"), ("a", "b")], [("u", "a"), ("a", "b")], ["turn without content dropped"]),
    ],
)
def test_what_is_corrected(spoken: Any, expected: Any, done: list[str]) -> None:
    conversation, names = repaired(*spoken)
    assert conversation == list(expected)
    assert names == done
    again, nothing = repaired(*conversation)
    assert again == conversation
    assert nothing == []


def test_what_is_not_to_be_learnt_stays_so_when_joined() -> None:
    row = {"messages": as_turns(("u", "a"), ("a", "b"), ("a", "c"))}
    row["messages"][1]["weight"] = 0
    conversation, _ = repair(row, MESSAGES)
    assert conversation[1] == {"role": "assistant", "content": "b\n\nc", "train": False}


def test_a_sound_row_of_another_form_is_what_training_reads() -> None:
    row = {"instruction": "Say it.", "input": "now", "output": "it", "system": "S"}
    form: Form = find_form(row, "auto", columns={}, roles={}, where="here")
    assert repair(row, form) == (to_conversation(row, form), [])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (as_turns(("u", "a")), "no assistant turn, so nothing to learn"),
        (as_turns(("u", "a"), ("a", " ")), "no assistant turn, so nothing to learn"),
        (
            as_turns(("u", "a"), ("critic", "b")),
            "role 'critic' is unknown; if it is the user's, set data.roles: {critic: user}",
        ),
        (as_turns(("u", "a"), ("tool", "5"), ("a", "b")), "a tool answers where nothing called it"),
        (as_turns(("u", 5), ("a", "b")), "the content of a turn is a number, not a string"),
        (as_turns(("a", "b")), "no assistant turn, so nothing to learn"),
        ("[{", "`messages` is a string that is not JSON"),
        ([], "`messages` is empty"),
    ],
)
def test_what_cannot_be_corrected(messages: Any, fault: str) -> None:
    with pytest.raises(RowFault) as caught:
        repair({"messages": messages}, MESSAGES)
    assert str(caught.value) == fault
