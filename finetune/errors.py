"""Errors a user can cause, each with the way out.

A user's mistake is a `FinetuneError`: it says what is wrong, where, which values are allowed and how to
fix it. The command line prints that message and exits with status 2; a traceback needs `--debug`.
Our own mistakes are `assert`s and stay tracebacks.
"""

from __future__ import annotations

import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent  # the checkout, if it is one


class FinetuneError(ValueError):
    """A mistake in what the user gave us.

    Args:
        what: one sentence that names the fault and the offending value.
        where: file, line, key or tensor where it was found.
        allowed: the values that would have been accepted.
        fix: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, allowed: str | None = None, fix: str | None = None):
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("allowed", self.allowed), ("fix", self.fix)):
            if text is not None:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class RecipeError(FinetuneError):
    """A recipe that cannot be read or does not fit the schema; carries every fault found."""

    def __init__(self, faults: list[FinetuneError]):
        assert faults, "a RecipeError needs at least one fault"
        self.faults = faults
        first = faults[0]
        super().__init__(first.what, where=first.where, allowed=first.allowed, fix=first.fix)

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        head = f"{len(self.faults)} faults in the recipe:"
        return "\n".join([head, *(str(fault) for fault in self.faults)])


class ModelError(FinetuneError):
    """A model folder, checkpoint or architecture that cannot be used."""


class DataError(FinetuneError):
    """A data set that is missing, empty, malformed, or supervises nothing."""


class AdapterError(FinetuneError):
    """An adapter or tuned-weights folder that does not fit the base it is put on."""


class OutputError(FinetuneError):
    """An output folder that is occupied, unwritable or too small."""


class DeviceError(FinetuneError):
    """A device that the recipe asks for and the machine does not have."""


class EngineError(FinetuneError):
    """An answer that the engine could not finish: its model's numbers, its device, or a fault of ours."""


class HubError(FinetuneError):
    """A repository on the hub that cannot be reached, read or written."""


def require_packages(*packages: str, where: str, extra: str) -> None:
    """Raises a FinetuneError if a package is not installed that an extra of ours brings."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise FinetuneError(f"not installed: {', '.join(missing)}", where=where, fix=install_command(extra))


def install_command(extra: str) -> str:
    """The command that installs what an extra of ours brings.

    In a checkout by the extra itself. Elsewhere by its requirements, because no index has this package, and whoever
    took its name there could have users install anything.
    """
    if (_ROOT / "pyproject.toml").is_file():
        root = "." if Path.cwd() == _ROOT else str(_ROOT)
        return f"pip install -e {shlex.quote(f'{root}[{extra}]')}"
    parts = [text.partition(";") for text in metadata.requires("moe-qlora") or ()]
    brought = [wanted.strip() for wanted, _, marker in parts if f"extra == '{extra}'" in marker.replace('"', "'")]
    assert brought, f"there is no extra {extra}"
    return "pip install " + " ".join(map(shlex.quote, brought))
