"""Values and keys as a user would write them, and JSON objects checked against types.

A file that a user gives is read into plain values; `check_object` compares them with types that pydantic knows (a model
or a dataclass) and says in one message which keys are wrong, what was found and what would do. Strict: no text becomes
a number. Unknown keys pass unless the type forbids them, because upstream adds keys with every release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of a document: `("trainable", "lora", "target_modules", 0)`."""

_LONGEST_SHOWN = 60
_MOST_SHOWN = 3
# The whole of what pydantic says -> in a user's words.
_WORDS = (
    (r"a valid boolean", "true or false"),
    (r"a valid integer.*", "a whole number"),
    (r"a valid number.*", "a number"),
    (r"a valid string", "text"),
    (r"a valid (?:tuple|list)", "a list"),
    (r"a valid dictionary.*", "a mapping"),
    (r"None", "null"),
    (r"(?:List|Tuple|Dictionary) should have at least 1 item.*", "one entry or more"),
    (r"(?:List|Tuple|Dictionary) should have at least (\d+) items.*", r"\1 entries or more"),
    (r"String should have at least 1 character", "text that is not empty"),
    (r"String should have at most (\d+) characters", r"text of at most \1 characters"),
    (r"String should match pattern (.*)", r"text that matches \1"),
)

Found = TypeVar("Found")
Error = TypeVar("Error", bound=Exception)

Count = Annotated[int, Field(gt=0, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class FileSchema(BaseModel):
    """What a JSON object of a file has to be: typed strictly, other keys pass."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


def dotted(path: KeyPath) -> str:
    """`trainable.lora.target_modules[0]`, as a user writes it."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def shown(value: object) -> str:
    """A value as YAML would spell it, on one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def allowed_words(message: str) -> str:
    """What pydantic's "Input should be ..." asks for, in a user's words."""
    allowed = message.removeprefix("Input should be ")
    for pattern, words in _WORDS:
        if match := re.fullmatch(pattern, allowed):
            return match.expand(words)
    return allowed


def check_object(
    content: Mapping[str, Any], types: type[Found], *, kind: Callable[..., Error], name: str, where: str, fix: str
) -> Found:
    """The object as `types`, a pydantic model or dataclass.

    Args:
        kind: the error to raise, called as a `FinetuneError` is.
        name: the file's name, for the message.

    Raises:
        Error: of the given kind; names up to three keys, what was found there and what is allowed.
    """
    try:
        return TypeAdapter(types).validate_python(content)
    except ValidationError as error:
        faults = _faults(error, content)
    texts = [
        f"{_named(path)} is missing" if found is None else f"{_named(path)} cannot be {found}"
        for path, (found, _) in faults.items()
    ]
    more = f" and {len(texts) - _MOST_SHOWN} more" if len(texts) > _MOST_SHOWN else ""
    allowed = [f"{dotted(path)}: {' or '.join(words)}" for path, (_, words) in faults.items() if words]
    raise kind(
        f"{name} does not fit: {', '.join(texts[:_MOST_SHOWN])}{more}",
        where=where,
        allowed="; ".join(allowed[:_MOST_SHOWN]) or None,
        fix=fix,
    )


def _named(path: KeyPath) -> str:
    return f"`{dotted(path)}`" if path else "the whole"


def _faults(error: ValidationError, content: Mapping[str, Any]) -> dict[KeyPath, tuple[str | None, list[str]]]:
    """Path -> what was found there (None: nothing), and what is allowed; a union's members share one path."""
    faults: dict[KeyPath, tuple[str | None, list[str]]] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "missing":
            faults[_real_path(problem["loc"][:-1], content) + problem["loc"][-1:]] = (None, [])
            continue
        path = _real_path(problem["loc"], content)
        unknown = problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        found = "a key" if unknown else shown(_at(path, content))
        words = faults.setdefault(path, (found, []))[1]
        said = "no key of this release of moe-qlora" if unknown else allowed_words(problem["msg"])
        if said not in words:
            words.append(said)
    return faults


def _real_path(loc: KeyPath, content: Any) -> KeyPath:
    """The part of pydantic's location that leads through the content; names of a union's members do not."""
    path: list[str | int] = []
    for key in loc:
        inside = (isinstance(content, dict) and key in content) or (
            isinstance(content, list) and isinstance(key, int) and key < len(content)
        )
        if inside:
            content = content[key]
            path.append(key)
    return tuple(path)


def _at(path: KeyPath, content: Any) -> Any:
    for key in path:
        content = content[key]
    return content
