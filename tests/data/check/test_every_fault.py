"""A set with one row of every fault: each is refused at its line, with its reason, and a corrected copy passes."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.data.chat import apply_template
from finetune.data.check.fix import write_fixed
from finetune.data.check.report import document
from finetune.data.prepare import prepare_data
from finetune.moe.load import load_tokenizer
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from tests.data.check.conftest import MODEL

RECIPE = Path(__file__).parent / "every_fault" / "recipe.yaml"
REFUSED = {
    6: "not valid JSON: it ends in the middle of a value",
    11: "valid JSON, but not an object",
    16: "not UTF-8",
    21: "the content of a turn is not valid Unicode (a lone surrogate)",
    26: "role 'critic' is unknown; if it is the user's, set data.roles: {critic: user}",
    30: "two user turns in a row",
    35: "the assistant speaks first",
    39: "no assistant turn, so nothing to learn",
    43: "`messages` is empty",
    47: "the content of a turn is a number, not a string",
    51: "the chat template refuses a conversation with tools: message 3 has role tool where the Mistral v1 format "
    "wants user: an optional system message first, then user and assistant in turn; mistral-v1, mistral-v3 and chatml "
    "write no tools",
    55: "every assistant turn is empty",
    59: "`messages` is missing",
}


def check(recipe: Recipe) -> dict:
    tokenizer = load_tokenizer(str(MODEL))
    template = apply_template(tokenizer, recipe.data.template)
    return document(recipe, prepare_data(recipe, tokenizer), template=template)


def test_every_fault_is_named_at_its_line() -> None:
    made = check(load_recipe(RECIPE))
    train, held_out = made["parts"]
    found = {int(place.split()[-1]): reason["reason"] for reason in train["refused"] for place in reason["where"]}
    assert found == REFUSED
    assert (train["rows"], train["used"]) == (89, 65)
    assert train["duplicates"]["exact"] == 2
    assert (train["too_long"]["dropped"], train["too_long"]["truncated"]) == (11, 1)
    assert made["leakage"]["where"] == ["heldout.jsonl line 21", "heldout.jsonl line 22"]
    assert held_out["refused"] == []
    assert [fault["level"] for fault in made["faults"]] == ["error", *["warning"] * 4]


def test_a_corrected_copy_has_none_of_what_can_be_mended(tmp_path: Path) -> None:
    write_fixed(load_recipe(RECIPE), tmp_path / "fixed")
    left = [json.loads(line) for line in (tmp_path / "fixed" / "refused.jsonl").read_text("utf-8").splitlines()]
    lines = {int(row["where"].split()[-1]) for row in left if row["where"].startswith("train")}
    mended = set(REFUSED) - lines
    assert mended >= {21, 30, 35}
    assert lines >= {6, 11, 16, 26, 39, 43, 55, 59}
    train, held_out = (tmp_path / "fixed" / f"{name}.jsonl" for name in ("train-0", "heldout-1"))
    again = check(load_recipe(RECIPE, [f"data.train={train}", f"data.eval={held_out}"]))
    [refused] = again["parts"][0]["refused"]  # by the template, not for what the row is
    assert refused["reason"] == REFUSED[51]
    assert again["parts"][0]["duplicates"]["exact"] == 0
    assert "error" not in [fault["level"] for fault in again["faults"]]
