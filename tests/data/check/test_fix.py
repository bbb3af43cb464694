"""A corrected copy: everything in it can be trained on, and every row is in it or set apart."""

from __future__ import annotations

import json

from finetune.data.check.fix import write_fixed
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
