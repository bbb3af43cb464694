"""Every recipe in the tree loads, says what it is, and reads back from what it resolves to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.recipe.load import load_recipe, resolved_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))


def test_the_recipes_that_the_documentation_names_exist() -> None:
    assert {str(path) for path in RECIPES} >= {
        "recipes/tiny-mixtral/qlora-attention.yaml",
        "recipes/tiny-mixtral/freeze-experts.yaml",
        "recipes/tiny-mixtral/train-router.yaml",
        "recipes/tiny-mixtral/collapsing-router.yaml",
        "recipes/mixtral-8x7b/qlora-attention-80gb.yaml",
        "recipes/mixtral-8x7b/freeze-experts-80gb.yaml",
        "recipes/mixtral-8x7b/qlora-attention-48gb.yaml",
        "recipes/mixtral-8x7b/qlora-attention-32gb.yaml",
        "recipes/mixtral-8x7b/instruct-80gb.yaml",
        "recipes/mixtral-8x22b/qlora-attention-80gb.yaml",
        "recipes/qwen3-30b-a3b/qlora-attention-24gb.yaml",
        "recipes/qwen3-30b-a3b/qlora-attention-80gb.yaml",
        "recipes/olmoe-1b-7b/qlora-attention-12gb.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / path)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    # What tuning gained shows only beside what the base could.
    assert recipe.training["eval_on_start"] is True
    # Another reader finds the same, so nothing in it hangs on the YAML version.
    assert yaml.safe_load(resolved_yaml(recipe))["training"] == recipe.training


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_opens_with_schema_hardware_measurement_and_launch_line(path: Path) -> None:
    header = []
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    (schema,) = [line.partition("$schema=")[2] for line in header if "yaml-language-server" in line]
    assert (ROOT / path.parent / schema).resolve() == ROOT / "docs" / "recipe.schema.json"
    starts = [line.split(":")[0] for line in header]
    assert starts.count("# hardware") == 1
    assert starts.count("# measured") == 1
    assert f"# launch:   finetune train {path}" in header


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_two_recipes_do_not_write_to_one_folder(path: Path) -> None:
    others = [load_recipe(ROOT / other).output.dir for other in RECIPES if other != path]
    assert load_recipe(ROOT / path).output.dir not in others


def test_the_classic_command() -> None:
    recipe = load_recipe(ROOT / "recipes/mixtral-8x7b/qlora-attention-80gb.yaml")
    assert recipe.model.path == "mistralai/Mixtral-8x7B-v0.1"
    assert (recipe.data.train, recipe.data.train_split, recipe.data.eval_split, recipe.data.format) == (
        "OpenAssistant/oasst_top1_2023-08-25",
        "train",
        "test",
        "chatml_text",
    )
    assert (recipe.trainable.lora.r, recipe.trainable.lora.alpha) == (16, 32)
    assert recipe.trainable.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (recipe.training["learning_rate"], recipe.training["per_device_train_batch_size"]) == (2e-4, 2)


def test_the_tiny_recipes_use_the_bundled_model_and_data() -> None:
    folder = ROOT / "recipes" / "tiny-mixtral"
    for name in ("qlora-attention", "freeze-experts", "train-router", "collapsing-router"):
        recipe = load_recipe(folder / f"{name}.yaml")
        assert recipe.model.path == str(folder / "model")
        assert recipe.data.train == str(folder / "data" / "train.jsonl")
        assert recipe.data.eval == str(folder / "data" / "heldout.jsonl")
