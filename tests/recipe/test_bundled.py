"""Bundled recipes: listed with what their headers say, copied so that they work anywhere, and their models' shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.recipe.bundled import SCHEMA, bundled_recipes, bundled_shape
from finetune.recipe.load import load_recipe
from tests.conftest import REPOSITORY
from tests.running import refused, run_finetune

RECIPES = {recipe.name: recipe for recipe in bundled_recipes()}


def test_the_list_is_the_folder() -> None:
    files = (REPOSITORY / "recipes").glob("*/*.yaml")
    assert set(RECIPES) == {str(path.relative_to(REPOSITORY / "recipes"))[: -len(".yaml")] for path in files}
    shown = run_finetune("recipe", "list")
    for recipe in RECIPES.values():
        assert all((recipe.about, recipe.hardware, recipe.measured))
        assert f"{recipe.name}\n" in shown.stdout
    listed = run_finetune("recipe", "list", "--json").document["recipes"]
    assert [recipe["name"] for recipe in listed] == list(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_copy_means_the_same_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_finetune("recipe", "copy", name, "--output", "my recipes/mine.yaml").status == 0
    copy = tmp_path / "my recipes" / "mine.yaml"
    assert load_recipe(copy) == load_recipe(RECIPES[name].path)
    first, *others = copy.read_text(encoding="utf-8").splitlines()
    assert Path(first.partition("$schema=")[2]) == SCHEMA
    assert "# launch:   finetune train 'my recipes/mine.yaml'" in others
    json.loads(SCHEMA.read_text(encoding="utf-8"))


def test_the_copy_is_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_finetune("recipe", "copy", "recipes/tiny-mixtral/qlora-attention.yaml").stdout
    assert said.startswith("qlora-attention.yaml: edit `data`, then `finetune preflight qlora-attention.yaml`")
    assert (tmp_path / "qlora-attention.yaml").is_file()


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n", encoding="utf-8")
    there = ("recipe", "copy", "tiny-mixtral/qlora-attention", "--output", tmp_path / "mine.yaml")
    refused(tmp_path, *there, says=("there is a file already", "mine.yaml", "--output"))
    near = "did you mean tiny-mixtral/qlora-attention?"
    other = tmp_path / "other.yaml"
    refused(tmp_path, "recipe", "copy", "tiny-mixtral/qlora-atention", "--output", other, says=(near, "recipe list"))
    refused(tmp_path, "recipe", "copy", "x", "--output", other, says=("no bundled recipe x", "mixtral-8x22b/"))


def test_the_shape_of_a_model_is_that_of_the_recipe_that_trains_it() -> None:
    for recipe in RECIPES.values():
        model = load_recipe(recipe.path).model.path
        shape = recipe.path.parent / "shape"
        assert bundled_shape(model) == (shape if shape.is_dir() else None)
    assert bundled_shape("some/model") is None


def test_preflight_counts_with_the_bundled_shape_and_says_so(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests, so that the hub gives nothing."""
    recipe = RECIPES["olmoe-1b-7b/qlora-attention-12gb"].path
    said = run_finetune("preflight", recipe, "--gpu-gib", 11.6).stdout
    assert "the hub did not give the model's config.json; counted with the one that comes with the toolkit" in said
    offline = run_finetune("preflight", recipe, "--gpu-gib", 11.6, "--json").document
    shape = f"model.path={recipe.parent / 'shape'}"
    named = run_finetune("preflight", recipe, "--gpu-gib", 11.6, "--json", "--set", shape).document
    assert (offline.pop("bundled_shape"), named.pop("bundled_shape")) == (True, False)
    assert offline == named
    unknown = run_finetune("preflight", recipe, "--gpu-gib", 11.6, "--set", "model.path=some/model")
    assert unknown.status == 2
    assert "'some/model' is neither a local folder nor a model that could be fetched from the hub" in unknown.stderr


H200 = sorted((REPOSITORY / "bench" / "results" / "h200").glob("recipe-*.json"))


@pytest.mark.parametrize("path", H200, ids=lambda path: path.stem)
def test_a_header_says_what_was_recorded(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    (override,) = run["overrides"]
    key, _, value = override.partition("=")
    held = f"held to {value} GiB" if key == "memory.budget_gib" else "not held"
    measured = RECIPES[run["recipe"].removeprefix("recipes/").removesuffix(".yaml")].measured
    peak, speed = run["memory"]["peak"]["allocated"] / 2**30, run["trainer"]["tokens_per_second"]
    assert f"{held}, {run['batch']} x {run['length']}: {peak:.1f} GiB" in measured
    assert f"{peak:.1f} GiB peak, {speed:,.0f} tokens/s" in measured
    # The estimate says more than was needed, and not much.
    assert -0.5 <= run["memory"]["estimate_error_percent"] <= 0.1
