"""Which rows train, which are held out, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.data.chat import apply_template
from finetune.data.prepare import held_out_rows, prepare_data
from finetune.data.rows import IGNORED
from finetune.moe.load import load_tokenizer
from tests.data.check.conftest import MODEL, turns, write_rows


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer(str(MODEL))
    apply_template(made, "auto")
    return made


def texts(rows, tokenizer) -> list[str]:
    """What is supervised, row by row."""
    return [
        tokenizer.decode([label for label in row["labels"] if label not in (IGNORED, tokenizer.eos_token_id)])
        for row in rows
    ]


def answers(count: int, name: str = "a") -> list[dict]:
    return [turns(f"question {i}", f"{name}{i}") for i in range(count)]


def test_a_fraction_is_held_out_and_equal_conversations_stay_together(make_recipe, tokenizer):
    rows = answers(40) + answers(5)
    recipe = make_recipe(rows, "data.eval_fraction=0.2")
    prepared = prepare_data(recipe, tokenizer)
    train, held_out = texts(prepared.train, tokenizer), texts(prepared.held_out, tokenizer)
    assert Counter(train) + Counter(held_out) == Counter(row["messages"][1]["content"] for row in rows)
    assert not set(train) & set(held_out)
    assert len(held_out) == pytest.approx(9, abs=1)
    assert prepared.leaked_rows == []
    again = prepare_data(recipe, tokenizer)
    assert texts(again.held_out, tokenizer) == held_out
    assert texts(held_out_rows(recipe, tokenizer), tokenizer) == held_out
    other = prepare_data(make_recipe(rows, "data.eval_fraction=0.2", "training.seed=1"), tokenizer)
    assert texts(other.held_out, tokenizer) != held_out


def test_a_number_of_rows_is_held_out(make_recipe, tokenizer):
    prepared = prepare_data(make_recipe(answers(20), "data.eval_rows=7"), tokenizer)
    assert (len(prepared.train), len(prepared.held_out)) == (13, 7)


@pytest.mark.parametrize(("how", "left"), [("off", 9), ("exact", 6), ("near", 5)])
def test_duplicates(make_recipe, tokenizer, how, left):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen " * 3
    rows = answers(3) + answers(3) + [turns("q", long), turns("q", long + "end"), turns("q", "something else")]
    prepared = prepare_data(make_recipe(rows, f"data.deduplicate={how}", "training.max_length=512"), tokenizer)
    [part] = prepared.parts
    assert len(prepared.train) == left
    assert (part.exact, part.near, part.removed) == (3, 1 if how == "near" else None, 9 - left)
    assert texts(prepared.train, tokenizer)[:3] == ["a0", "a1", "a2"]


def test_rows_of_one_conversation_are_not_duplicates_of_each_other(make_recipe, tokenizer):
    rows = [turns(*["word " * 20, "answer " * 20] * 4)]
    prepared = prepare_data(
        make_recipe(rows, "data.too_long=split", "data.deduplicate=exact", "training.max_length=64"), tokenizer
    )
    assert len(prepared.train) == 4
    assert prepared.parts[0].exact == 0


def test_sources_are_mixed_by_weight_and_every_row_is_seen(make_recipe, tokenizer, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [{"prompt": f"q{i}", "completion": f"b{i}"} for i in range(10)])
    recipe = make_recipe(answers(40), f"data.more=[{{path: {more}, weight: 3}}]", "data.train_weight=1")
    found = texts(prepare_data(recipe, tokenizer).train, tokenizer)
    by_source = Counter(text[0] for text in found)
    assert set(found) >= {f"a{i}" for i in range(40)} | {f"b{i}" for i in range(10)}
    assert by_source["b"] / by_source["a"] == pytest.approx(3, rel=0.35)  # 160 draws
    assert texts(prepare_data(recipe, tokenizer).train, tokenizer) == found
    first = make_recipe(answers(40), f"data.more=[{{path: {more}, weight: 3}}]", "data.mixture=first_exhausted")
    assert len(prepare_data(first, tokenizer).train) < 30


def test_packed_rows_hold_every_example_once_and_whole(make_recipe, tokenizer):
    rows = [turns(f"question {i}", "word " * (i % 17 + 1)) for i in range(120)]
    plain = prepare_data(make_recipe(rows, "training.max_length=64"), tokenizer).train
    packed = prepare_data(make_recipe(rows, "training.max_length=64", "training.packing=true"), tokenizer).train
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        begin = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][begin : begin + length], row["labels"][begin : begin + length]))
            begin += length
    key = str
    assert sorted(found, key=key) == sorted(((row["input_ids"], row["labels"]) for row in plain), key=key)


def test_leaks_are_named(make_recipe, tokenizer):
    recipe = make_recipe(answers(5), held_out=[turns("question 3", "a3"), turns("new", "one")])
    assert prepare_data(recipe, tokenizer).leaked_rows == ["heldout.jsonl line 1"]


def test_eval_packing_follows_its_own_setting(make_recipe, tokenizer):
    both = ("training.packing=true", "training.max_length=64")
    packed = prepare_data(make_recipe(answers(9), *both, held_out=answers(4, "b")), tokenizer)
    assert "seq_lengths" in packed.held_out.column_names
    recipe = make_recipe(answers(9), *both, "training.eval_packing=false", held_out=answers(4, "b"))
    assert "seq_lengths" not in prepare_data(recipe, tokenizer).held_out.column_names
