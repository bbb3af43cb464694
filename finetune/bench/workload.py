"""What a bench runs on: a recipe of the user's with full rows, and a shape that needs no checkpoint.

Rows are the bundled conversations joined until they are longer than a row, so that every row is full and every token
is real. The rest of the recipe stays as it is: method, optimizer, checkpointing, router watching, logging.

The shape with --random-weights, by the first that applies: the folder that `model.path` names; the bundled shape of
that hub id; the hub. A shape without a tokenizer gets the bundled one.

Leaves out: padding, evaluation and saving, which are not what a training step costs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError, ModelError
from finetune.recipe import RECIPES, Recipe, bundled_shape, load_recipe

WARM_UP = 3  # steps before the clock starts: kernels are compiled, the allocator's cache grows, clocks settle
BUNDLED = RECIPES / "tiny-mixtral"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Every token of the bundled text has fewer characters on average: joined texts of this many a token fill a row.
_CHARACTERS_PER_TOKEN = 8
# What the bench decides, and the option that says it instead.
_OWN_KEYS = {
    "training.max_steps": "--steps",
    "training.num_train_epochs": "--steps",
    "training.gradient_accumulation_steps": "--batch",
    "training.per_device_train_batch_size": "--batch",
    "training.max_length": "--length",
    "data.train": None,
    "data.format": None,
    "output.dir": None,
}


@dataclass(frozen=True)
class Workload:
    """A recipe to measure; `steps` are measured, after `WARM_UP` and before one that closes the window."""

    recipe: Recipe
    batch: int
    length: int
    steps: int

    @property
    def all_steps(self) -> int:
        return WARM_UP + self.steps + 1


def make_workload(
    path: Path,
    overrides: Sequence[str],
    *,
    scratch: Path,
    batch: int | None,
    length: int | None,
    steps: int,
    random_weights: bool,
) -> Workload:
    """The user's recipe over full rows.

    Args:
        scratch: folder for rows, the run's output and, where needed, a shape with a tokenizer.
        batch: rows of a micro-batch; the recipe's when None.
        length: tokens of a row; the recipe's when None.

    Raises:
        RecipeError: faults in the recipe or the overrides.
        FinetuneError: an override of what the bench decides itself.
    """
    _refuse_own_keys(overrides)
    recipe = load_recipe(path, overrides)
    # The defaults are TRL's.
    batch = batch or recipe.training.get("per_device_train_batch_size", 8)
    length = length or recipe.training.get("max_length") or 1024
    made = Workload(recipe, batch, length, steps)
    rows = scratch / "rows.jsonl"
    write_full_rows(rows, rows=batch * made.all_steps, tokens=length)
    settings = {
        "data.train": rows,
        "data.train_split": "train",
        "data.eval": "null",
        "data.eval_split": "null",
        "data.more": "[]",
        "data.eval_fraction": "null",
        "data.eval_rows": "null",
        "data.format": "messages",
        "data.columns": "{}",
        "data.roles": "{}",
        "data.too_long": "cut",  # to exactly full rows
        "data.deduplicate": '"off"',
        "data.tokens_per_batch": "null",
        "data.max_rows": "null",
        "training.eval_strategy": '"no"',
        "training.eval_on_start": "false",
        "training.save_strategy": '"no"',
        "training.max_steps": made.all_steps,
        "training.per_device_train_batch_size": batch,
        "training.gradient_accumulation_steps": 1,
        "training.max_length": length,
        "router.probe_tokens": 0,  # read at evaluations
        "output.dir": scratch / "run",
        "output.push_to_hub": "null",
    }
    every = recipe.training.get("logging_steps", 10)
    # So that the window holds a log, as often as the recipe's training does or more.
    settings["training.logging_steps"] = min(every, steps) if isinstance(every, int) else every
    if random_weights:
        settings["model.path"] = shape_path(recipe.model.path, scratch)
    ours = [f"{key}={value}" for key, value in settings.items()]
    return Workload(load_recipe(path, [*overrides, *ours]), batch, length, steps)


def shape_path(model: str, scratch: Path) -> str:
    """Folder with the config and tokenizer of a shape, or the hub id itself."""
    shape = Path(model) if Path(model).is_dir() else bundled_shape(model)
    if shape is None:
        return model
    if all((shape / name).is_file() for name in TOKENIZER_FILES):
        return str(shape)
    config = shape / "config.json"
    if not config.is_file():
        raise ModelError("there is no config.json", where=str(shape), fix="name a model folder")
    folder = scratch / "model"
    folder.mkdir()
    shutil.copy(config, folder)
    copy_tokenizer(folder)
    return str(folder)


def copy_tokenizer(folder: Path) -> None:
    """Puts the bundled tokenizer into a folder."""
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / "model" / name, folder)


def write_full_rows(path: Path, *, rows: int, tokens: int) -> None:
    """Conversations longer than `tokens` tokens each, by joining the bundled ones."""
    turns = _endless(BUNDLED / "data" / "train.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages: list[dict[str, str]] = []
            while sum(len(message["content"]) for message in messages) < tokens * _CHARACTERS_PER_TOKEN:
                messages += next(turns)
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _endless(source: Path) -> Iterator[list[dict[str, str]]]:
    """The conversations again and again, without system prompts, which only open one."""
    with source.open(encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    while True:
        for messages in conversations:
            yield [message for message in messages if message["role"] != "system"]


def _refuse_own_keys(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in _OWN_KEYS:
            option = _OWN_KEYS[key]
            raise FinetuneError(
                f"a bench sets `{key}` itself",
                where=f"--set {text}",
                fix="remove it" if option is None else f"say it with {option}",
            )
