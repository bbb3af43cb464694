"""What `finetune evaluate` refuses, before a model loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune.recipe.load import load_recipe
from tests.models import tiny_model
from tests.running import refused, run_finetune


def test_models_of_another_vocabulary(
    saved_adapter: Path, small_mixtral: Path, conversations: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_mixtral, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = "▁the", "▁of"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    args = ("evaluate", saved_adapter, "--compare", other, "--data", conversations)
    refused(tmp_path, *args, says=("the two models have other tokens", f"--compare {other}", "same base"))


def test_models_of_another_shape(saved_adapter: Path, small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    tiny_model("mixtral", vocab_size=32064, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    args = ("evaluate", saved_adapter, "--compare", tmp_path / "other", "--data", conversations)
    allowed = "vocabulary 32000, 2 layers, 2 of 4 experts a token"
    refused(tmp_path, *args, says=("not of one shape", "vocabulary 32064, 1 layers, 2 of 4 experts", allowed))


def test_no_data(saved_adapter: Path, small_mixtral: Path, tmp_path: Path) -> None:
    says = ("there are no held-out conversations to compare on", "--data FILE")
    refused(tmp_path, "evaluate", saved_adapter, "--compare", "base", says=says)
    refused(tmp_path, "evaluate", small_mixtral, says=says)


def test_data_that_is_not_there(saved_adapter: Path, tmp_path: Path) -> None:
    args = ("evaluate", saved_adapter, "--compare", "base", "--data", tmp_path / "none.jsonl")
    refused(tmp_path, *args, says=("none.jsonl",))


def test_rows_that_cannot_be_used_are_told(small_mixtral: Path, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (good, {"messages": 3}, good)))
    ran = run_finetune("evaluate", small_mixtral, "--data", data, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["comparison"]["conversations"] == 2
    said = " ".join((ran.stdout + ran.stderr).split())
    assert "warning: 1 of 3 rows not used: `messages` is a number, not a list (data.jsonl line 2)" in said


def test_a_run_of_another_version(saved_adapter: Path, tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe()).model_dump(mode="json")
    recipe["router"]["gone"] = 1
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    says = ("of another version", "run.json: router.gone", "name conversations with --data")
    refused(tmp_path, "evaluate", tmp_path / "adapter", "--compare", "base", says=says)


def test_base_of_no_adapter(small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    args = ("evaluate", small_mixtral, "--compare", "base", "--data", conversations)
    refused(tmp_path, *args, says=("there is no base to compare it with", "./base for a folder of that name"))


def test_survival_asked_for_wrongly(saved_adapter: Path, small_mixtral: Path, tmp_path: Path) -> None:
    refused(tmp_path, "evaluate", small_mixtral, "--survival", says=("there is no adapter", "an adapter folder"))
    refused(tmp_path, "evaluate", saved_adapter, "--scale-to", 0.1, says=("--scale-to belongs to --survival",))
    wrong = ("evaluate", saved_adapter, "--survival", "--scale-to", 3)
    refused(tmp_path, *wrong, says=("3.0 is not a size of an update", "above 0, at most 1"))
    # Its B is zero, as before the first step.
    refused(tmp_path, "evaluate", saved_adapter, "--survival", says=("the adapter changes no weight",))
