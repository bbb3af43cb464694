"""The fields of TRL's `SFTConfig`, read from its source without importing it.

Why: a recipe is checked before anything heavy loads, and importing trl costs several seconds and all of torch.
How: the installed packages are found by `importlib.util.find_spec` (which runs nothing of them), and `ast` follows
`SFTConfig` through its bases to `transformers.TrainingArguments`. Annotation, literal default, help text and
choices of each field become a `TrainingField`. A test compares the result with `dataclasses.fields(SFTConfig)`.

Left out: an annotation that is neither a plain type, a union, a `Literal` nor an enum accepts anything, and a
default that is computed is unknown.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from finetune.errors import FinetuneError
from finetune.recipe.yaml12 import NUMBER

UNKNOWN: Final = object()
"""The default of a field whose default is computed, not written."""

# Python's name of a type -> the JSON Schema type that YAML gives for it.
_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "None": "null",
    **dict.fromkeys(("dict", "Dict", "Mapping"), "object"),
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "Sequence"), "array"),
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
# Choices that the sources hold in computed form or in prose only; each is compared with the library in a test.
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
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
        return any(_is(value, name) for name in self.types)

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
        if self.anything:
            return {}
        # `null` reads better inside an enum than beside it.
        null_as_choice = self.choices and self.types == ("null",)
        types = () if null_as_choice else self.types
        options: list[dict[str, Any]] = []
        if self.choices:
            options.append({"enum": [*self.choices, None] if null_as_choice else list(self.choices)})
        if types:
            options.append({"type": types[0] if len(types) == 1 else list(types)})
            if self.items is not None and not self.items.anything:
                options[-1]["items"] = self.items.json_schema()
        return options[0] if len(options) == 1 else {"anyOf": options}


@dataclass(frozen=True)
class TrainingField:
    """One init field of `SFTConfig`; `default` is `UNKNOWN` when the source computes it."""

    name: str
    accepts: Accepts
    default: Any
    help: str


@functools.cache
def training_fields() -> Mapping[str, TrainingField]:
    """The init fields of the installed `trl.SFTConfig`, in the order of its signature."""
    return read_fields({name: package_folder(name) for name in ("trl", "transformers")}, "trl", "SFTConfig")


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FinetuneError(f"the package {name} is not installed", fix=f"pip install {name}")
    return Path(spec.submodule_search_locations[0])


def read_fields(packages: Mapping[str, Path], package: str, class_name: str) -> dict[str, TrainingField]:
    """Reads a dataclass and its bases from source.

    Args:
        packages: the folders of the packages that imports are followed into.
        package: the one among them that defines or imports the class in its `__init__.py`, however indirectly.
    """
    sources = _Sources(packages)
    found = sources.find_class(packages[package], class_name)
    if found is None:
        raise FinetuneError(
            f"{package} has no {class_name} where one was expected",
            where=str(packages[package]),
            fix=f"install a release of {package} that this toolkit supports (see constraints.txt)",
        )
    return _fields_of(*found, sources)


class _Sources:
    """Where a name in a module of a few packages is defined; each module is parsed once."""

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self._packages = packages
        self._names: dict[Path, dict[str, ast.ClassDef | tuple[Path, str]]] = {}

    def find_class(self, module: Path, name: str) -> tuple[ast.ClassDef, Path] | None:
        """The class that `name` means in a module, and the file that defines it; None outside the packages."""
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file not in self._names:
            self._names[file] = self._read(file) if file.is_file() else {}
        meaning = self._names[file].get(name)
        if isinstance(meaning, tuple):
            return self.find_class(*meaning)
        return None if meaning is None else (meaning, file)

    def _read(self, file: Path) -> dict[str, ast.ClassDef | tuple[Path, str]]:
        """Name -> the class of that name, or the module and name it is imported from."""
        names: dict[str, ast.ClassDef | tuple[Path, str]] = {}
        # Outer statements come first, and `if TYPE_CHECKING:` imports are among them.
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, node)
            elif isinstance(node, ast.ImportFrom) and (target := self._target(file, node)) is not None:
                for alias in node.names:
                    names.setdefault(alias.asname or alias.name, (target, alias.name))
        return names

    def _target(self, file: Path, node: ast.ImportFrom) -> Path | None:
        parts = node.module.split(".") if node.module else []
        if node.level:
            return file.parents[node.level - 1].joinpath(*parts)
        return self._packages[parts[0]].joinpath(*parts[1:]) if parts[0] in self._packages else None


def _fields_of(cls: ast.ClassDef, file: Path, sources: _Sources) -> dict[str, TrainingField]:
    fields: dict[str, TrainingField] = {}
    for base in reversed(cls.bases):
        found = sources.find_class(file, base.id) if isinstance(base, ast.Name) else None
        if found is not None:
            fields.update(_fields_of(*found, sources))
    for statement in cls.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name, options = statement.target.id, _field_options(statement.value)
        if _head(statement.annotation) == "ClassVar" or _literal(options.get("init")) is False:
            fields.pop(name, None)
        else:
            fields[name] = _field(name, _accepts(statement.annotation, file, sources), options)
    return fields


def _field(name: str, accepts: Accepts, options: Mapping[str, ast.expr]) -> TrainingField:
    metadata = dict(_constant_items(options.get("metadata")))
    choices = metadata.get("choices") or _CHOICES.get(name)
    if isinstance(choices, list | tuple):
        accepts = replace(accepts, types=tuple(t for t in accepts.types if t != "string"), choices=tuple(choices))
    if metadata.get("const") is True and "boolean" not in accepts.types:  # argparse: the bare flag means True
        accepts = replace(accepts, types=("boolean", *accepts.types))
    factory = options.get("default_factory")
    default = _literal(options.get("default"))
    if isinstance(factory, ast.Name) and factory.id in ("list", "dict"):
        default = [] if factory.id == "list" else {}
    # argparse wants "%%" for a percent sign.
    return TrainingField(name, accepts, default, str(metadata.get("help", "")).replace("%%", "%"))


def _field_options(value: ast.expr | None) -> dict[str, ast.expr]:
    """The keywords of `field(...)`; a plain default counts as `default`."""
    if isinstance(value, ast.Call) and _head(value.func) == "field":
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    return {} if value is None else {"default": value}


def _constant_items(node: ast.expr | None) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and _literal(value) is not UNKNOWN:
                yield str(key.value), _literal(value)


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return UNKNOWN
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _accepts(node: ast.expr, file: Path, sources: _Sources) -> Accepts:
    """What an annotation takes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _accepts(ast.parse(node.value, mode="eval").body, file, sources)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([node.left, node.right], file, sources)
    if isinstance(node, ast.Subscript):
        head, arguments = _head(node.value), node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if head == "Union":
            return _union(arguments, file, sources)
        if head == "Optional":
            return _union([*arguments, ast.Constant(None)], file, sources)
        if head == "Literal":
            return _literals([_literal(argument) for argument in arguments])
        if _TYPES.get(head) == "array":
            return Accepts(("array",), items=_accepts(arguments[0], file, sources))
        return Accepts((_TYPES[head],)) if head in _TYPES else Accepts()
    head = _head(node)
    if head in _TYPES:
        return Accepts((_TYPES[head],))
    return Accepts(choices=_enum_values(head, file, sources))


def _literals(values: list[object]) -> Accepts:
    """`Literal[...]`: None is a type of its own in YAML, the rest are choices."""
    return Accepts(("null",) if None in values else (), tuple(value for value in values if value is not None))


def _union(nodes: list[ast.expr], file: Path, sources: _Sources) -> Accepts:
    members = [_accepts(node, file, sources) for node in nodes]
    if any(member.anything for member in members):
        return Accepts()
    # `SchedulerType | str` means the text of one of the enum's values, not any text.
    enums = any(_enum_values(_head(node), file, sources) for node in nodes)
    types = [name for member in members for name in member.types if not (enums and name == "string")]
    return Accepts(
        types=tuple(dict.fromkeys(types)),
        choices=tuple(choice for member in members for choice in member.choices),
        items=next((member.items for member in members if member.items is not None), None),
    )


def _enum_values(name: str, file: Path, sources: _Sources) -> tuple[str, ...]:
    """The values of an enum of strings; empty for anything else."""
    found = sources.find_class(file, name) if name else None
    if found is None or not any(_head(base).endswith("Enum") for base in found[0].bases):
        return ()
    values = [_literal(node.value) for node in found[0].body if isinstance(node, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str))


def _head(node: ast.expr) -> str:
    """The last name of `name`, `module.name` or `name[...]`; "None" for None, "" for anything else."""
    if isinstance(node, ast.Subscript):
        return _head(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return "None" if isinstance(node, ast.Constant) and node.value is None else ""


def _is(value: object, name: str) -> bool:
    """Whether a YAML value has a JSON Schema type. A boolean is no number; a whole number is a number."""
    match name:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return type(value) is int or (isinstance(value, float) and math.isfinite(value))
        case "string":
            return isinstance(value, str)
        case "object":
            return isinstance(value, dict)
        case _:
            return value is None if name == "null" else False
