"""What pydantic finds wrong with a recipe, in a user's words.

Pydantic reports a location, a type of problem and its own sentence. Here each becomes a `Fault` that says which
keys or values would do and what to write instead: the nearest known name, or the section that a stray key
belongs to. Our own checks inside the schema carry `Fault`s already and pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.recipe.faults import Fault, nearest
from finetune.recipe.schema import SELF_MADE, DataSource, PushSection, Recipe
from finetune.recipe.training import open_fields
from finetune.values import KeyPath, allowed_words, dotted, shown


def _sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sections(field.annotation, (*path, name))


_SECTIONS: Mapping[KeyPath, type[BaseModel]] = dict(_sections(Recipe))
_TRAINING: KeyPath = ("training",)
# Sections that null leaves out.
_OPTIONAL: Mapping[KeyPath, type[BaseModel]] = {("output", "push_to_hub"): PushSection}
# Lists of sections.
_ITEMS: Mapping[KeyPath, type[BaseModel]] = {("data", "more"): DataSource}


def explain(error: ValidationError) -> Iterator[Fault]:
    """The faults behind a `ValidationError` of `Recipe`."""
    for problem in error.errors():
        path: KeyPath = problem["loc"]
        if problem["type"] == SELF_MADE:
            yield from problem["ctx"][SELF_MADE]
        elif problem["type"] == "extra_forbidden":
            yield _unknown_key(path)
        elif problem["type"] == "missing":
            yield _missing_key(path)
        else:
            yield _wrong_value(path, problem["input"], problem["msg"], problem.get("ctx", {}))


def _unknown_key(path: KeyPath) -> Fault:
    section, name = path[:-1], path[-1]
    item = bool(section) and isinstance(section[-1], int)
    known = list((_ITEMS[section[:-1]] if item else (_OPTIONAL.get(section) or _SECTIONS[section])).model_fields)
    elsewhere = [dotted((*home, name)) for home, model in _SECTIONS.items() if name in model.model_fields]
    if name in open_fields():
        elsewhere.append(dotted((*_TRAINING, name)))
    close = nearest(name, known)
    fix = f"move it to `{elsewhere[0]}`" if elsewhere else f"write `{close}`" if close else "remove it"
    inside = f" in `{dotted(section)}`" if section else ""
    return Fault(path, f"unknown {'key' if section else 'section'} `{name}`{inside}", ", ".join(known), fix)


def _missing_key(path: KeyPath) -> Fault:
    kind = "key" if path[:-1] else "section"
    example = f"add `{path[-1]}:` under `{dotted(path[:-1])}:`" if path[:-1] else f"add `{path[-1]}:`"
    if path in _SECTIONS:
        required = [name for name, field in _SECTIONS[path].model_fields.items() if field.is_required()]
        example += f" with {', '.join(f'`{name}`' for name in required)}"
    return Fault(path, f"the {kind} `{dotted(path)}` is missing", None, example)


def _wrong_value(path: KeyPath, value: object, message: str, context: Mapping[str, Any]) -> Fault:
    if path in _SECTIONS or path in _OPTIONAL or path == _TRAINING:
        what = f"`{dotted(path)}` is a section, and cannot be {shown(value)}"
        return Fault(path, what, "a mapping: one indented key a line", f"write keys under `{dotted(path)}:`")
    allowed = allowed_words(message)
    choices = str(context.get("expected", "")).replace(" or ", ", ").replace("'", "").split(", ")
    close = nearest(value, ("true", "false") if allowed == "true or false" else choices)
    return Fault(path, f"`{dotted(path)}` cannot be {shown(value)}", allowed, f"write `{close}`" if close else None)
