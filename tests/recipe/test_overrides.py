"""`--set section.key=value` on top of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from tests.recipe.recipe_texts import SMALLEST, faults_of, message, write


def test_values_are_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALLEST),
        [
            "training.learning_rate=1e-4",
            "training.save_strategy=no",
            "training.packing=true",
            "trainable.lora.target_modules=[q_proj, v_proj]",
            "trainable.lora.r = 4",
            "data.eval_split=a=b",
            "logging={wandb: offline, project: p}",
            "model.revision=",
        ],
    )
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.training["save_strategy"] == "no"
    assert recipe.training["packing"] is True
    assert recipe.trainable.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.trainable.lora.r == 4
    assert recipe.data.eval_split == "a=b"
    assert (recipe.logging.wandb, recipe.logging.project) == ("offline", "p")
    assert recipe.model.revision is None


def test_an_override_mends_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    text = SMALLEST.replace("dir: out", "dir: 3") + "training:\n  seed: x\n"
    recipe = load_recipe(write(tmp_path, text), ["output.dir=a", "output.dir=b", "training={seed: 1}"])
    assert recipe.output.dir == "b"
    assert recipe.training["seed"] == 1


def test_a_section_can_come_from_the_command_line_alone(tmp_path: Path) -> None:
    text = SMALLEST.replace("output:\n  dir: out\n", "") + "trainable:\n"
    recipe = load_recipe(write(tmp_path, text), ["output.dir=o", "trainable.lora.r=2"])
    assert (recipe.output.dir, recipe.trainable.lora.r) == ("o", 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.learning_rate=fast",
            "`training.learning_rate` cannot be 'fast'\n  where: --set training.learning_rate=fast\n"
            "  allowed: a number",
        ),
        (
            "training.learning_rat=1",
            "unknown key `learning_rat` in `training`\n  where: --set training.learning_rat=1\n"
            "  allowed: fields of TRL's SFTConfig (`finetune recipe schema` lists them)\n  fix: write `learning_rate`",
        ),
        (
            "trainable.lora={r: 0}",
            "`trainable.lora.r` cannot be 0\n  where: --set trainable.lora={r: 0}: trainable.lora.r\n"
            "  allowed: greater than 0",
        ),
        (
            "training.seed",
            "`training.seed` sets nothing\n  where: --set training.seed\n  allowed: section.key=value\n"
            "  fix: name a key and a value, as in training.learning_rate=1e-4",
        ),
        (
            "training..seed=3",
            "`training..seed=3` sets nothing\n  where: --set training..seed=3\n  allowed: section.key=value\n"
            "  fix: name a key and a value, as in training.learning_rate=1e-4",
        ),
        (
            "model.path.name=x",
            "`model.path` is 'some/model' and has no keys\n  where: --set model.path.name=x\n"
            "  fix: set `model.path` itself, or edit the recipe",
        ),
        (
            "data.train=[a",
            "not valid YAML: expected ',' or ']', but got '<stream end>'\n  where: --set data.train=[a\n"
            "  fix: correct the line, or quote the text in it",
        ),
        (
            "modle.path=x",
            "unknown section `modle`\n  where: --set modle.path=x\n"
            "  allowed: model, quantization, trainable, data, training, memory, router, logging, output\n"
            "  fix: write `model`",
        ),
    ],
)
def test_faults_name_the_option(tmp_path: Path, override: str, expected: str) -> None:
    assert message(tmp_path, SMALLEST, [override]) == expected


def test_faults_of_file_and_options_come_together(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, SMALLEST + "router:\n  log: 3\n", ["training.seed=x", "nonsense"])
    assert [fault.what for fault in faults] == [
        "`nonsense` sets nothing",
        "`training.seed` cannot be 'x'",
        "`router.log` cannot be 3",
    ]
