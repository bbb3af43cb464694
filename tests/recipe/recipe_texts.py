"""A smallest recipe and the message of a broken one, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.errors import FinetuneError, RecipeError
from finetune.recipe.load import load_recipe

SMALLEST = "model:\n  path: some/model\ndata:\n  train: some/data\noutput:\n  dir: out\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def faults_of(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> list[FinetuneError]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    assert str(caught.value)
    return caught.value.faults


def message(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> str:
    """The one fault's text, with the folder cut from its places."""
    (only,) = faults_of(folder, text, overrides)
    return str(only).replace(f"{folder}/", "")
