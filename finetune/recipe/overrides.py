"""`--set training.learning_rate=1e-4`: values from the command line on top of a recipe file.

The key is a dotted path, the value is YAML (`--set trainable.lora.target_modules=[q_proj,v_proj]`). The place of
each overridden value becomes the option itself, so a fault in it is reported there and not at the file's line.
Items of a list cannot be addressed: give the whole list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune.errors import FinetuneError
from finetune.recipe import yaml12
from finetune.recipe.faults import OVERRIDE
from finetune.values import dotted, shown


def apply_overrides(document: yaml12.Document, overrides: Sequence[str]) -> None:
    """Sets values in a parsed recipe, in the order given; what is wrong is added to the document's faults."""
    for text in overrides:
        place = OVERRIDE + text
        key, equals, value_text = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            document.faults.append(
                FinetuneError(
                    f"`{text}` sets nothing",
                    where=place,
                    allowed="section.key=value",
                    fix="name a key and a value, as in training.learning_rate=1e-4",
                )
            )
            continue
        parsed = yaml12.parse(value_text, _always(place))
        document.faults += parsed.faults
        # A value that is not YAML has left a fault, and null would only add another one.
        if not parsed.faults:
            _set(document, path, parsed.value, place)


def _always(place: str) -> Callable[[int, int | None], str]:
    return lambda line, column: place


def _set(document: yaml12.Document, path: tuple[str, ...], value: Any, place: str) -> None:
    section = document.value
    for depth, key in enumerate(path[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
            document.places.setdefault(path[:depth], place)
        section = section[key]
        if not isinstance(section, dict):
            name = dotted(path[:depth])
            document.faults.append(
                FinetuneError(
                    f"`{name}` is {shown(section)} and has no keys", where=place, fix=f"set `{name}` itself, or mend it"
                )
            )
            return
    section[path[-1]] = value
    for old in [written for written in document.places if written[: len(path)] == path]:
        del document.places[old]
    document.places[path] = place
