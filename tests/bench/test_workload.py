"""What a bench makes of a recipe: full rows, few steps, a shape without a checkpoint, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.bench.workload import BUNDLED, TOKENIZER_FILES, WARM_UP, make_workload, shape_path, write_full_rows
from finetune.errors import FinetuneError, ModelError
from finetune.moe.load import load_tokenizer
from tests.conftest import REPOSITORY

MIXTRAL = REPOSITORY / "recipes" / "mixtral-8x7b" / "qlora-attention-80gb.yaml"
SHAPE = MIXTRAL.parent / "shape"


def test_every_row_is_longer_than_asked(tmp_path: Path) -> None:
    write_full_rows(tmp_path / "rows.jsonl", rows=40, tokens=512)
    tokenizer = load_tokenizer(str(BUNDLED / "model"))
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    assert len(conversations) == 40
    assert min(len(tokenizer("".join(turn["content"] for turn in row)).input_ids) for row in conversations) > 512
    for row in conversations:
        assert [turn["role"] for turn in row] == ["user", "assistant"] * (len(row) // 2)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 40


def test_the_recipe_keeps_what_the_bench_does_not_decide(tmp_path: Path) -> None:
    made = make_workload(
        MIXTRAL,
        ["trainable.lora.r=8", "training.logging_steps=1"],
        scratch=tmp_path,
        batch=None,
        length=512,
        steps=5,
        random_weights=True,
    )
    assert (made.batch, made.length, made.all_steps) == (2, 512, WARM_UP + 5 + 1)
    training = made.recipe.training
    assert training["max_steps"] == made.all_steps
    assert (training["per_device_train_batch_size"], training["max_length"]) == (2, 512)
    assert training["learning_rate"] == 2e-4
    assert training["logging_steps"] == 1
    assert made.recipe.trainable.lora.r == 8
    assert (made.recipe.data.eval, made.recipe.data.eval_split) == (None, None)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 * made.all_steps


def test_a_hub_id_is_the_shape_beside_the_recipe(tmp_path: Path) -> None:
    made = make_workload(MIXTRAL, [], scratch=tmp_path, batch=1, length=64, steps=1, random_weights=True)
    model = Path(made.recipe.model.path)
    assert model.parent == tmp_path
    assert (model / "config.json").read_bytes() == (SHAPE / "config.json").read_bytes()
    assert all((model / name).is_file() for name in TOKENIZER_FILES)


def test_the_log_falls_into_the_window(tmp_path: Path) -> None:
    made = make_workload(MIXTRAL, [], scratch=tmp_path, batch=1, length=64, steps=4, random_weights=True)
    assert made.recipe.training["logging_steps"] == 4


def test_which_shape(tmp_path: Path, small_mixtral: Path) -> None:
    assert shape_path(str(small_mixtral), tmp_path) == str(small_mixtral)
    assert shape_path("some/model", tmp_path) == "some/model"
    assert shape_path("mistralai/Mixtral-8x7B-v0.1", tmp_path) == str(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == (SHAPE / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "random_weights", "model"),
    [([], False, "mistralai/Mixtral-8x7B-v0.1"), (["model.path=other/model"], True, "other/model")],
)
def test_a_model_that_is_not_replaced_by_a_shape(
    tmp_path: Path, overrides: list[str], random_weights: bool, model: str
) -> None:
    made = make_workload(
        MIXTRAL, overrides, scratch=tmp_path, batch=1, length=64, steps=1, random_weights=random_weights
    )
    assert made.recipe.model.path == model


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        shape_path(str(tmp_path / "empty"), tmp_path)


@pytest.mark.parametrize(
    ("override", "way_out"),
    [("training.max_steps=10", "--steps"), ("training.max_length=10", "--length"), ("data.train=x", "remove it")],
)
def test_what_the_bench_decides_cannot_be_overridden(
    override: str, way_out: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    with pytest.raises(FinetuneError) as refused:
        make_workload(write_recipe(), [override], scratch=tmp_path, batch=1, length=8, steps=1, random_weights=True)
    assert f"a bench sets `{override.partition('=')[0]}` itself" in str(refused.value)
    assert way_out in str(refused.value)
