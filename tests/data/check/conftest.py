"""Recipes over made-up rows with the bundled tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe

MODEL = Path(__file__).parents[3] / "recipes" / "tiny-mixtral" / "model"
Make = Callable[..., Recipe]


def turns(*texts: str) -> dict[str, Any]:
    """A row of user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe over rows for training, and over held-out ones if they are given; `settings` are overrides."""
    monkeypatch.setenv("MOE_QLORA_CACHE", str(tmp_path / "cache"))

    def make(train: list[Any] | Path, *settings: str, held_out: list[Any] | None = None) -> Recipe:
        file = tmp_path / "recipe.yaml"
        path = train if isinstance(train, Path) else write_rows(tmp_path / "train.jsonl", train)
        data = f"  train: {path}\n"
        if held_out is not None:
            data += f"  eval: {write_rows(tmp_path / 'heldout.jsonl', held_out)}\n"
        file.write_text(f"model:\n  path: {MODEL}\ndata:\n{data}output:\n  dir: {tmp_path / 'out'}\n", encoding="utf-8")
        return load_recipe(file, settings)

    return make
