"""The report's numbers against a count by hand, and what it calls faults."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.console import Report
from finetune.data.chat import apply_template
from finetune.data.check.check import check_data
from finetune.data.check.report import document, require_sound
from finetune.data.check.words import unused
from finetune.data.prepare import prepare_data
from finetune.errors import DataError, ModelError
from finetune.moe.load import load_tokenizer
from finetune.train.run import train
from tests.data.check.conftest import MODEL, turns, write_rows
from tests.running import Ran, run_finetune

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer(str(MODEL))
    apply_template(made, "auto")
    return made


def check(recipe, tokenizer) -> dict[str, Any]:
    made = document(recipe, prepare_data(recipe, tokenizer), template="mistral-v1")
    assert json.loads(json.dumps(made, allow_nan=False)) == made, "strict JSON"
    return made


def levels(made: dict[str, Any]) -> list[str]:
    return [fault["level"] for fault in made["faults"]]


def spelled(row: dict[str, Any], tokenizer) -> tuple[list[int], list[int]]:
    """Ids and supervised ids of a conversation in Mistral's v1 format, piece by piece (no spaces at seams)."""
    ids, learnt = [tokenizer.bos_token_id], []
    for turn in row["messages"]:
        if turn["role"] == "user":
            ids += tokenizer.encode(f"[INST] {turn['content']} [/INST]", add_special_tokens=False)
        else:
            answer = [*tokenizer.encode(turn["content"], add_special_tokens=False), tokenizer.eos_token_id]
            ids, learnt = ids + answer, learnt + answer
    return ids, learnt


def test_counts_equal_a_count_by_hand(make_recipe, tokenizer):
    good = [turns(f"question {i}", f"answer {i} " + "word " * i, "more?", "yes") for i in range(30)]
    long = [turns("q", "word " * 100, "r", "end"), turns("q", "word " * 300)]
    bad = ["{", {"messages": "x"}, turns("only a question"), {"messages": []}, "{"]
    equal = [good[3], good[3]]
    made = check(make_recipe(good + bad + long + equal, "training.max_length=120"), tokenizer)
    [part] = made["parts"]
    by_hand = [spelled(row, tokenizer) for row in good + equal]
    first = spelled({"messages": long[0]["messages"][:2]}, tokenizer)  # what is left of the first long one
    assert len(first[0]) <= 120 < len(spelled(long[0], tokenizer)[0])
    rows = [*by_hand, first]
    assert (part["rows"], part["used"]) == (39, 33)
    assert sum(reason["rows"] for reason in part["refused"]) == 5
    assert part["examples"] == len(rows) == 33
    assert part["tokens"] == sum(len(ids) for ids, _ in rows)
    assert part["supervised_tokens"] == sum(len(learnt) for _, learnt in rows)
    assert part["supervised_share"] == part["supervised_tokens"] / part["tokens"]
    assert (part["turns"], part["turns_with_end"], part["rows_unsupervised"]) == (65, 65, 0)
    assert part["too_long"] == {
        "policy": "truncate",
        "rows": 2,
        "dropped": 1,
        "truncated": 1,
        "split": 0,
        "tokens_lost": sum(len(spelled(row, tokenizer)[0]) for row in long) - len(first[0]),
    }
    assert part["duplicates"] == {"exact": 2, "near": None, "removed": 0}
    lengths = sorted(len(ids) for ids, _ in rows)
    assert (part["lengths"]["longest"], part["lengths"]["median"]) == (lengths[-1], lengths[len(lengths) // 2])
    for bin in part["lengths"]["histogram"]:
        assert bin["rows"] == sum(bin["from"] <= length < bin["to"] for length in lengths)
    assert sum(bin["rows"] for bin in part["lengths"]["histogram"]) == 33
    where = {reason["reason"]: reason["where"] for reason in part["refused"]}
    assert sorted(place for places in where.values() for place in places) == [
        f"train.jsonl line {line}" for line in range(31, 36)
    ]


def test_the_fingerprint_is_of_the_conversations_alone(make_recipe, tokenizer, tmp_path):
    rows = [turns(f"question {i}", f"answer {i}") for i in range(4)]

    def fingerprint(given: list[Any] | Path) -> str:
        return check(make_recipe(given), tokenizer)["parts"][0]["fingerprint"]

    # By hand: roles and texts of each conversation, then the conversations in order.
    keys = ("\x1f".join(text for m in row["messages"] for text in (m["role"], m["content"])) for row in rows)
    hashed = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    assert fingerprint(rows) == hashlib.blake2b(hashed, digest_size=16).hexdigest()
    moved = write_rows(tmp_path / "elsewhere.jsonl", [{"id": 1, **row} for row in rows])
    assert fingerprint(moved) == fingerprint(rows)
    assert len({fingerprint(rows), fingerprint(rows[::-1]), fingerprint(rows[:3])}) == 3


def test_packing_and_steps(make_recipe, tokenizer):
    rows = [turns(f"question {i}", "word " * (1 + i % 40)) for i in range(300)]
    recipe = make_recipe(
        rows,
        *("training.packing=true", "training.max_length=128", "training.per_device_train_batch_size=3"),
        *("training.gradient_accumulation_steps=2", "training.num_train_epochs=2"),
    )
    prepared = prepare_data(recipe, tokenizer)
    made = document(recipe, prepared, template="mistral-v1")
    [part] = made["parts"]
    real = sum(len(row["input_ids"]) for row in prepared.train)
    assert real == part["tokens"]
    micro_batches = math.ceil(len(prepared.train) / 3)
    assert part["batches"] == {
        "kind": "packed",
        "rows": len(prepared.train),
        "batches": micro_batches,
        "tokens": 128 * len(prepared.train),
        "efficiency": real / len(prepared.train) / 128,
    }
    per_epoch = math.ceil(micro_batches / 2)
    assert made["schedule"]["steps"] == 2 * per_epoch
    assert made["schedule"]["epochs"] == 2
    assert made["schedule"]["tokens_per_epoch"] == 128 * len(prepared.train)
    assert made["schedule"]["hours"] is None


def test_healthy_data_have_no_faults(make_recipe, tokenizer):
    made = check(make_recipe([turns(f"q{i}", "a") for i in range(9)], held_out=[turns("new", "b")]), tokenizer)
    assert made["faults"] == []
    require_sound(made)


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([turns("q", "a"), "{", "{"], (), "2 of 3 rows cannot be used, the first: not valid JSON"),
        ([turns("q", "word " * 99)], ("training.max_length=20",), "1 are longer than training.max_length 20"),
        ([turns("q", "word " * 99)], ("training.max_length=20", "data.too_long=cut"), "never learn to stop"),
    ],
)
def test_data_that_make_training_meaningless_are_refused(make_recipe, tokenizer, rows, settings, says):
    made = check(make_recipe(rows, *settings), tokenizer)
    assert "error" in levels(made)
    with pytest.raises(DataError) as refusal:
        require_sound(made)
    assert says in str(refusal.value)
    assert "finetune data check" in str(refusal.value)


def test_few_unusable_rows_are_a_warning(make_recipe, tokenizer):
    rows = [turns(f"q{i}", "a") for i in range(30)]
    made = check(make_recipe([*rows, "{"]), tokenizer)
    assert levels(made) == ["warning"]
    require_sound(made)
    assert levels(check(make_recipe([*rows, "{"], "data.max_refused=0"), tokenizer)) == ["error"]


def test_held_out_rows_in_train(make_recipe, tokenizer):
    rows = [turns(f"q{i}", "a") for i in range(10)]
    some = check(make_recipe(rows, held_out=[rows[2], turns("new", "b")]), tokenizer)
    assert some["leakage"] == {"exact": 1, "near": None, "where": ["heldout.jsonl line 1"]}
    assert levels(some) == ["warning"]
    every = check(make_recipe(rows, held_out=rows[:3]), tokenizer)
    assert levels(every) == ["warning"]
    assert "evaluation measures memory" in every["faults"][0]["what"]


def test_a_drawn_part_is_counted_once(make_recipe, tokenizer):
    rows = [turns(f"q{i}", "a") for i in range(20)]
    train, held_out = check(make_recipe([*rows, "{"], "data.eval_rows=4"), tokenizer)["parts"]
    assert (train["rows"], train["used"], train["held_out"], train["examples"]) == (21, 16, 4, 16)
    assert (held_out["rows"], held_out["used"], held_out["held_out"], held_out["examples"]) == (4, 4, 0, 4)
    assert (held_out["sources"], held_out["refused"]) == ([], [])
    assert unused(train) == "4 held out, 1 refused"


def test_what_the_model_never_sees_is_a_warning(make_recipe, tmp_path):
    rows = [{"id": i, "messages": turns(f"q{i}", f" a{i}")["messages"]} for i in range(3)]
    rows[0]["tools"] = [{"name": "wx"}]
    rows[1]["messages"][1]["thinking"] = "Hm."
    rows[2]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    strips = "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    strips += "{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    (tmp_path / "strips.jinja").write_text(strips, encoding="utf-8")
    recipe = make_recipe(rows, f"data.template={tmp_path / 'strips.jinja'}")
    tokenizer = load_tokenizer(str(MODEL))
    apply_template(tokenizer, recipe.data.template)
    made = check(recipe, tokenizer)
    found = {entry["what"]: (entry["rows"], entry["matters"]) for entry in made["parts"][0]["unseen"]}
    assert found == {
        "`id`": (3, False),
        "`tools`, which the chat template leaves out": (1, True),
        "`thinking` of turns, which the chat template leaves out": (1, True),
        "text of system messages, which the chat template leaves out": (1, True),
        "white space around the text of assistant messages, which the chat template leaves out": (3, False),
    }
    said = [fault["what"] for fault in made["faults"]]
    left_out = "which the chat template leaves out: 1 of 3 rows have it, and the model never sees it"
    assert f"train: `tools`, {left_out} (train.jsonl line 1)" in said
    assert len(said) == 3
    assert levels(made) == ["warning"] * 3


def test_batches_count_a_mixture_as_it_trains(make_recipe, tokenizer, tmp_path):
    """Rows of the small set come again until the large one has been seen."""
    more = write_rows(tmp_path / "more.jsonl", [turns("q", "b")])
    recipe = make_recipe([turns(f"q{i}", "a") for i in range(20)], f"data.more=[{{path: {more}}}]")
    prepared = prepare_data(recipe, tokenizer)
    [part] = document(recipe, prepared, template="mistral-v1")["parts"]
    assert part["examples"] == 21
    assert part["batches"]["rows"] == len(prepared.train) > 30


def test_near_leaks_are_counted_where_near_ones_are_looked_for(make_recipe, tokenizer):
    text = " ".join(f"word{i}" for i in range(80))
    recipe = make_recipe(
        [turns("q", text)], "data.deduplicate=near", held_out=[turns("q", text + " end"), turns("other", "b")]
    )
    assert check(recipe, tokenizer)["leakage"]["near"] == 1


def test_the_command_shows_writes_and_refuses(tmp_path, make_recipe):
    rows = [turns("q", "a <script>alert(1)</script>"), turns("q2", "b"), turns("only a question")]
    write_rows(tmp_path / "rows.jsonl", rows)
    make_recipe(tmp_path / "rows.jsonl")

    def run(*args: object) -> Ran:
        return run_finetune("data", "check", tmp_path / "recipe.yaml", *args)

    page, fixed = tmp_path / "page.html", tmp_path / "fixed"
    done = run("--json", "--show", "1", "--html", page, "--fix", fixed)
    assert done.status == 1, done.stderr
    made = done.document
    assert made["parts"][0]["used"] == 2
    assert len(made["examples"]) == 1
    assert "".join(piece["text"] for piece in made["examples"][0]["pieces"]).startswith("<s> [INST] q")
    assert "<script>alert(1)" not in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in fixed.iterdir()) == ["fixes.json", "refused.jsonl", "rows-0.jsonl"]
    again = run("--fix", fixed)
    assert again.status == 2
    assert "the output folder is not empty" in again.stderr
    passed = run("--set", "data.max_refused=1")
    assert passed.status == 0
    assert "no assistant turn" in passed.stdout


def test_the_check_refuses_the_models_that_training_refuses(make_recipe, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    larger = load_tokenizer(str(MODEL))
    larger.add_tokens(["<extra>"])
    larger.save_pretrained(folder)
    for path, says in (
        (folder, "the tokenizer has 32001 tokens, the model's embedding 32000"),
        (tmp_path / "nowhere", "nowhere"),
        ("nobody/a-model-of-the-hub", "nobody/a-model-of-the-hub"),
    ):
        recipe = make_recipe([turns("q", "a")], f"model.path={path}")
        said = []
        for refuse in (
            lambda recipe=recipe: check_data(recipe, Report(), name="r"),
            lambda recipe=recipe: train(recipe, Report()),
        ):
            with pytest.raises(ModelError) as caught:
                refuse()
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert says in said[0]
