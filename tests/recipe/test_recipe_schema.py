"""The typed recipe itself, and the JSON Schema that editors read."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.recipe.schema import (
    DataSection,
    LoraSection,
    ModelSection,
    OutputSection,
    Recipe,
    TrainableSection,
    recipe_schema,
)

ROOT = Path(__file__).parents[2]
PUBLISHED, CONSTRAINTS = ROOT / "docs" / "recipe.schema.json", ROOT / "constraints.txt"


def recipe(**sections: object) -> Recipe:
    given = {"model": ModelSection(path="m"), "data": DataSection(train="d"), "output": OutputSection(dir="o")}
    return Recipe(**(given | sections))  # type: ignore[arg-type]


def test_a_recipe_built_in_code_checks_itself() -> None:
    assert recipe().training["learning_rate"] == 2e-4
    with pytest.raises(ValidationError, match=r"unknown key `lr` in `training` \(write `learning_rate`\)"):
        recipe(training={"lr": 1})
    with pytest.raises(ValidationError, match="trains the attention in full"):
        recipe(trainable=TrainableSection(method="non_moe"))


def test_sections_are_frozen_and_survive_pickling() -> None:
    whole = recipe()
    with pytest.raises(ValidationError, match="frozen"):
        whole.model.path = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        whole.model = ModelSection(path="other")  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(whole)) == whole


def test_recipes_do_not_share_their_training() -> None:
    first, second = recipe(), recipe()
    first.training["seed"] = 1
    assert second.training["seed"] == 42


def test_types_are_strict() -> None:
    with pytest.raises(ValidationError):
        LoraSection(r="16")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        LoraSection(use_dora=1)  # type: ignore[arg-type]
    assert LoraSection(dropout=0).dropout == 0.0


def test_every_key_is_described_and_no_other_allowed() -> None:
    schema = recipe_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert section["description"]
    for section in schema["$defs"].values():
        assert all(key["description"] for key in section["properties"].values())
    training = schema["properties"]["training"]
    assert training["additionalProperties"] is False
    assert training["properties"]["learning_rate"]["default"] == 2e-4
    assert training["properties"]["learning_rate"]["type"] == "number"
    assert training["properties"]["eval_strategy"]["enum"] == ["no", "steps", "epoch"]
    assert training["properties"]["max_length"]["description"].startswith("Maximum length of the tokenized sequence.")


def test_the_published_schema_is_current() -> None:
    """`finetune recipe schema > docs/recipe.schema.json` renews it.

    It is written under the versions that constraints.txt pins; under others, `training` has other fields.
    """
    published, made = json.loads(PUBLISHED.read_text(encoding="utf-8")), json.loads(json.dumps(recipe_schema()))
    then, now = (schema["properties"]["training"] for schema in (published, made))
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if "==" in line)
    assert then["$comment"] == ", ".join(f"{name} {pins[name]}" for name in ("trl", "transformers"))
    if now["$comment"] != then["$comment"]:
        now.update({key: then[key] for key in ("$comment", "properties")})
    assert published == made


def test_the_schema_names_the_versions_whose_fields_it_lists() -> None:
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers"))
    assert recipe_schema()["properties"]["training"]["$comment"] == installed
