"""The recipes that come with the toolkit: found in a wheel or a checkout, listed, and copied to be edited.

A recipe's header says what it is for; nothing is registered. A copy says everything by absolute paths that the original
says relative to its own folder, so that it works wherever it lies.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from finetune.disk import write_text
from finetune.errors import FinetuneError
from finetune.recipe import yaml12

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "recipes"
RECIPES = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "recipes"
SCHEMA = _IN_WHEEL / "recipe.schema.json" if _IN_WHEEL.is_dir() else _PACKAGE.parent / "docs" / "recipe.schema.json"
"""JSON Schema of recipes, to which `$schema=` in a recipe's first line points."""


@dataclass(frozen=True)
class BundledRecipe:
    """One recipe of the toolkit, as its header describes it."""

    name: str
    """Folder and file without `.yaml`: `mixtral-8x7b/qlora-attention-80gb`."""
    path: Path
    about: str
    hardware: str
    measured: str


def bundled_recipes() -> list[BundledRecipe]:
    """All of them, by name."""
    return [_described(path) for path in sorted(RECIPES.glob("*/*.yaml"))]


def copy_recipe(name: str, target: Path) -> None:
    """Writes a bundled recipe to `target`, to be edited there.

    Raises:
        FinetuneError: no such recipe, or `target` exists.
    """
    path = _find(name).path
    if target.exists():
        raise FinetuneError("there is a file already", where=str(target), fix="name another with --output")
    text = re.sub(r"\$schema=\S+", lambda _: f"$schema={SCHEMA}", path.read_text(encoding="utf-8"), count=1)
    text = re.sub(
        r"^# launch: .*$", lambda _: f"# launch:   finetune train {shlex.quote(str(target))}", text, count=1, flags=re.M
    )
    text = re.sub(r"(?<=: )\.\.?/\S+", lambda relative: os.path.abspath(path.parent / relative[0]), text)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)


def bundled_shape(model: str) -> Path | None:
    """Folder with the config.json of a model on the hub, if a bundled recipe trains it: for estimates without a hub."""
    for path in sorted(RECIPES.glob("*/*.yaml")):
        if (path.parent / "shape").is_dir():
            document = yaml12.parse(path.read_text(encoding="utf-8"), lambda line, column: "a bundled recipe")
            if document.value["model"]["path"] == model:
                return path.parent / "shape"
    return None


def _find(name: str) -> BundledRecipe:
    known = {recipe.name: recipe for recipe in bundled_recipes()}
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
    fix = f"did you mean {near[0]}? " if near else ""
    fix += "`finetune recipe list` shows all"
    raise FinetuneError(f"there is no bundled recipe {name}", allowed=", ".join(known), fix=fix)


def _described(path: Path) -> BundledRecipe:
    """Reads the comment at a recipe's head: what it is in free lines, then `hardware:` and `measured:`."""
    said: dict[str, list[str]] = {"about": [], "hardware": [], "measured": [], "launch": []}
    key = "about"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        if text.startswith("yaml-language-server:"):
            continue
        word, colon, rest = text.partition(":")
        if colon and word in said:
            key, text = word, rest.strip()
        if text:
            said[key].append(text)
    about, hardware, measured = (" ".join(said[key]) for key in ("about", "hardware", "measured"))
    name = path.relative_to(RECIPES).with_suffix("").as_posix()
    return BundledRecipe(name, path, about, hardware, measured)
