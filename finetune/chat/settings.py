"""Sampling settings as a user types them: `temperature=0.7 top_p=0.9`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from finetune.errors import DataError
from finetune.infer import Sampling

NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def with_settings(sampling: Sampling, given: Sequence[str]) -> Sampling:
    """The sampling with some of its fields set, all of them or none.

    Args:
        given: `name=value`, each.

    Raises:
        DataError: an unknown name, a value that is no number, or one outside its range.
    """
    values: dict[str, int | float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise DataError(
                f"{text!r} sets nothing", where="/set", allowed="NAME=VALUE", fix="write for example temperature=0.7"
            )
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise DataError(
                f"there is no setting {name!r}",
                where=f"/set {text}",
                allowed=", ".join(NAMES),
                fix=f"did you mean {near[0]}?" if near else "choose one of them",
            )
        values[name] = _number(name, value, whole=isinstance(getattr(Sampling(), name), int))
    return dataclasses.replace(sampling, **values)  # type: ignore[arg-type]


def shown(sampling: Sampling) -> str:
    """All settings in one line, as `with_settings` takes them."""
    return " ".join(f"{name}={getattr(sampling, name)}" for name in NAMES)


def _number(name: str, value: str, *, whole: bool) -> int | float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise DataError(
            f"{name} is {value!r}",
            where=f"/set {name}={value}",
            allowed="a whole number" if whole else "a number",
            fix=f"write for example {name}={getattr(Sampling(), name)}",
        ) from None
