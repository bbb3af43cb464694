"""The fields of TRL's `SFTConfig`: which YAML values each takes, its default and its help text.

A recipe is checked before anything heavy loads, and importing trl costs six seconds and all of torch. So the fields of
the pinned releases lie in training_fields.json; only where other releases of trl or transformers are installed is
`SFTConfig` itself imported and read. A test compares the file with the library. To renew it after changing a pin:

    python -m finetune.recipe.training_fields
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.metadata
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.recipe.yaml12 import NUMBER

_TABLE = Path(__file__).with_suffix(".json")
# Python's type -> the JSON Schema type that YAML gives for it -> how a user would call it.
_TYPES: Mapping[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
    dict: "object",
    list: "array",
}
_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "null": "null",
    "object": "a mapping",
    "array": "a list",
}
# Choices that the library names in its help text only.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "pad_to_multiple_of": ("auto",),
}


@dataclass(frozen=True)
class Accepts:
    """Which YAML values an annotation takes; nothing at all given means anything.

    Args:
        types: names of JSON Schema types.
        choices: single values accepted beside those types.
        items: what the elements of a list must be.
    """

    types: tuple[str, ...] = ()
    choices: tuple[object, ...] = ()
    items: Accepts | None = None

    @property
    def anything(self) -> bool:
        return not self.types and not self.choices

    def takes(self, value: object) -> bool:
        if self.anything or any(type(choice) is type(value) and choice == value for choice in self.choices):
            return True
        if isinstance(value, list):
            return "array" in self.types and (self.items is None or all(self.items.takes(item) for item in value))
        if type(value) is int and "number" in self.types:
            return True
        return _TYPES.get(type(value)) in self.types and not (isinstance(value, float) and not math.isfinite(value))

    def convert(self, value: Any) -> Any:
        """The value as the field wants it: a number written as text ("2e-4", common in YAML 1.1) becomes one."""
        if isinstance(value, str) and "number" in self.types and not self.takes(value) and NUMBER.fullmatch(value):
            return float(value)
        return value

    def describe(self) -> str:
        words = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in self.choices]
        for name in self.types:
            of = f" of {self.items.describe()}" if name == "array" and self.items and not self.items.anything else ""
            words.append(_WORDS[name] + of)
        return " | ".join(words)

    def json_schema(self) -> dict[str, Any]:
        choices, kinds = list(self.choices), list(self.types)
        if choices and kinds == ["null"]:  # `null` reads better inside an enum than beside it
            choices, kinds = [*choices, None], []
        options: list[dict[str, Any]] = [{"enum": choices}] if choices else []
        if kinds:
            options.append({"type": kinds[0] if len(kinds) == 1 else kinds})
            if self.items is not None and not self.items.anything:
                options[-1]["items"] = self.items.json_schema()
        return {} if not options else options[0] if len(options) == 1 else {"anyOf": options}


@dataclass(frozen=True)
class TrainingField:
    """One init field of `SFTConfig`."""

    name: str
    accepts: Accepts
    default: Any
    help: str


@functools.cache
def training_fields() -> Mapping[str, TrainingField]:
    """The init fields of the installed `trl.SFTConfig`, in the order of its signature."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    if table["releases"] == installed_releases():
        return {
            name: TrainingField(**field | {"accepts": _read(field["accepts"])})
            for name, field in table["fields"].items()
        }
    from trl import SFTConfig

    return read_fields(SFTConfig)


def installed_releases() -> dict[str, str]:
    """Versions of the two packages that make up `SFTConfig`."""
    return {name: _release(name) for name in ("trl", "transformers")}


def read_fields(config: type) -> dict[str, TrainingField]:
    """The init fields of a dataclass whose metadata are those of `transformers.HfArgumentParser`."""
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.init]
    return {field.name: _field(field, _accepts(hints[field.name])) for field in fields}


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise FinetuneError(f"the package {name} is not installed", fix=f"pip install {name}") from None


def _field(field: dataclasses.Field[Any], accepts: Accepts) -> TrainingField:
    choices = tuple(field.metadata.get("choices") or _CHOICES.get(field.name, ()))
    if choices:
        accepts = replace(accepts, types=tuple(kind for kind in accepts.types if kind != "string"), choices=choices)
    if field.metadata.get("const") is True and "boolean" not in accepts.types:  # argparse: the bare flag means True
        accepts = replace(accepts, types=("boolean", *accepts.types))
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = made.value if isinstance(made, enum.Enum) else made
    # argparse wants "%%" for a percent sign.
    return TrainingField(field.name, accepts, default, str(field.metadata.get("help", "")).replace("%%", "%"))


def _accepts(hint: Any) -> Accepts:
    """What an annotation takes. A type that YAML has no value for takes anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union([_accepts(argument) for argument in arguments])
    if origin is typing.Literal:
        nullable = ("null",) if None in arguments else ()
        return Accepts(nullable, tuple(argument for argument in arguments if argument is not None))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Accepts(choices=tuple(member.value for member in hint))
    kind = _TYPES.get(origin or hint)
    items = _accepts(arguments[0]) if kind == "array" and arguments else None
    return Accepts((kind,), items=items) if kind else Accepts()


def _union(members: Iterable[Accepts]) -> Accepts:
    members = list(members)
    if any(member.anything for member in members):
        return Accepts()
    # `SchedulerType | str` means the text of one of the enum's values, not any text.
    enums = any(isinstance(choice, str) for member in members for choice in member.choices)
    kinds = [kind for member in members for kind in member.types if not (enums and kind == "string")]
    choices = tuple(choice for member in members for choice in member.choices)
    return Accepts(tuple(kinds), choices, next((member.items for member in members if member.items), None))


def _read(given: dict[str, Any]) -> Accepts:
    items = _read(given["items"]) if given["items"] else None
    return Accepts(tuple(given["types"]), tuple(given["choices"]), items)


def _write_table() -> None:
    from trl import SFTConfig

    fields = {name: dataclasses.asdict(field) for name, field in read_fields(SFTConfig).items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(field)}" for name, field in fields.items())
    _TABLE.write_text(
        f'{{"releases": {json.dumps(installed_releases())}, "fields": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    _write_table()
