"""A recipe file and `--set` options to a checked `Recipe`, and back to YAML.

    text --yaml12--> values and places -- --set --> values --schema--> Recipe

Whatever is wrong along the way is collected and raised as one `RecipeError`, each fault with its line. Only
contradictions between two sections wait until each of them is right by itself.
Whether the named model, data or device exists is not asked here: that is the business of who opens them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.errors import FinetuneError, RecipeError
from finetune.recipe import yaml12
from finetune.recipe.explain import explain
from finetune.recipe.faults import OVERRIDE, located
from finetune.recipe.foreign import foreign_recipe
from finetune.recipe.schema import Recipe
from finetune.runfolder import RunFolder, run_of
from finetune.values import dotted, shown

_LARGEST = 1_000_000  # bytes; a recipe has about a thousand, a checkpoint given by mistake many millions
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_SECTIONS = frozenset(Recipe.model_fields)

# Values that may name a file or a folder, and whether "./" starts at the recipe (outputs start where one works).
_PATHS = {
    ("model", "path"): True,
    ("data", "train"): True,
    ("data", "eval"): True,
    ("data", "template"): True,
    ("output", "dir"): False,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        path: the YAML file. Paths in it that start with "./" or "../" are taken from its folder. For the folder of a
            run, or its adapter's, the recipe of that run, with `output.dir` there.
        overrides: `section.key=value` texts. Paths in them are taken from the working directory.

    Raises:
        RecipeError: with every fault found.
    """
    run = RunFolder(run_of(Path(path)))
    of_run = run.run_file.is_file()
    file = run.recipe if of_run else Path(path)
    document = _parse(file)
    _anchor(document.value, file.parent)
    if of_run and isinstance(document.value.get("output"), dict):
        document.value["output"]["dir"] = str(run.root)  # it may have been moved
    return _checked(document, overrides)


def recipe_for_data(data: str, model: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that says no more than what it trains on and for which model; overrides and errors as `load_recipe`."""
    value = {"model": {"path": model}, "data": {"train": data}, "output": {"dir": "outputs"}}
    return _checked(yaml12.Document(value, {(): "the command line"}), overrides)


def _checked(document: yaml12.Document, overrides: Sequence[str]) -> Recipe:
    _apply_overrides(document, overrides)
    _anchor(document.value, Path())
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        document.faults += [located(fault, document.places) for fault in explain(error)]
    if document.faults:
        raise RecipeError(document.faults)
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """Everything a recipe says and implies, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml12.dump(recipe.model_dump())


def _parse(path: Path) -> yaml12.Document:
    if path.is_file() and path.name.lower().removesuffix(".gz").endswith(_DATA):
        raise _is_data(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        fix = "name the .yaml file in it" if path.is_dir() else "check the path"
        raise _refuse(f"cannot read the recipe: {error.strerror}", str(path), fix) from None
    except ValueError as error:  # a path with a null character in it
        raise _refuse(f"cannot read the recipe: {error}", ascii(str(path)), "check the path") from None
    if len(raw) > _LARGEST:
        raise _refuse(f"more than {_LARGEST:,} bytes, and so not a recipe", str(path), "name a recipe file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _refuse("the recipe is not UTF-8 text", f"{path}:{line}", "save it as UTF-8") from None
    document = yaml12.parse(
        text, lambda line, column: f"{path}:{line}" if column is None else f"{path}:{line}:{column}"
    )
    if path.suffix.lower() == ".json" and not (isinstance(document.value, dict) and _SECTIONS & document.value.keys()):
        raise _is_data(path)
    if not document.places and document.faults:  # not YAML at all
        raise RecipeError(document.faults)
    if document.value is None:
        raise _refuse("the recipe is empty", str(path), "start from a file in recipes/")
    if not isinstance(document.value, dict):
        what = f"a recipe is a mapping of sections, and this is {shown(document.value)}"
        raise _refuse(what, document.places[()], "start from a file in recipes/")
    if (foreign := foreign_recipe(document.value, _SECTIONS, document.places[()])) is not None:
        raise RecipeError([foreign])
    return document


def _is_data(path: Path) -> RecipeError:
    name = shlex.quote(str(path))
    fix = f"look at it with `finetune data check {name} --model MODEL`; to train on it, set data.train in a recipe"
    return _refuse("this is a data file, not a recipe", str(path), fix)


def _apply_overrides(document: yaml12.Document, overrides: Sequence[str]) -> None:
    """Sets values in a parsed recipe, in the order given.

    The key is a dotted path, the value is YAML (`trainable.lora.target_modules=[q_proj,v_proj]`); items of a list
    cannot be addressed. The place of an overridden value becomes the option itself, so a fault in it is reported there.
    """
    for text in overrides:
        place = OVERRIDE + text
        key, equals, value_text = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            fix = "name a key and a value, as in training.learning_rate=1e-4"
            fault = FinetuneError(f"`{text}` sets nothing", where=place, allowed="section.key=value", fix=fix)
            document.faults.append(fault)
            continue
        parsed = yaml12.parse(value_text, lambda line, column, place=place: place)  # type: ignore[misc]
        document.faults += parsed.faults
        # A value that is not YAML has left a fault, and null would only add another one.
        if not parsed.faults:
            _set(document, path, parsed.value, place)


def _set(document: yaml12.Document, path: tuple[str, ...], value: Any, place: str) -> None:
    section = document.value
    for depth, key in enumerate(path[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
            document.places.setdefault(path[:depth], place)
        section = section[key]
        if not isinstance(section, dict):
            name = dotted(path[:depth])
            what, fix = (
                f"`{name}` is {shown(section)} and has no keys",
                f"set `{name}` itself, or edit the recipe",
            )
            document.faults.append(FinetuneError(what, where=place, fix=fix))
            return
    section[path[-1]] = value
    for old in [written for written in document.places if written[: len(path)] == path]:
        del document.places[old]
    document.places[path] = place


def _refuse(what: str, where: str, fix: str) -> RecipeError:
    return RecipeError([FinetuneError(what, where=where, fix=fix)])


def _anchor(values: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute, in place, so that they mean the same file from anywhere."""
    for (section, key), from_recipe in _PATHS.items():
        _anchor_key(values.get(section), key, folder, from_recipe=from_recipe)
    data = values.get("data")
    more = data.get("more") if isinstance(data, dict) else None
    for source in more if isinstance(more, list) else ():
        _anchor_key(source, "path", folder, from_recipe=True)


def _anchor_key(keys: Any, key: str, folder: Path, *, from_recipe: bool) -> None:
    if not isinstance(keys, dict) or not isinstance(path := keys.get(key), str):
        return
    if path.startswith("~/"):
        keys[key] = os.path.expanduser(path)
    elif from_recipe and path.split("/")[0] in (".", ".."):
        keys[key] = os.path.abspath(folder / path)
