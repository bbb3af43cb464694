"""Runs the `finetune` command in this process, as the console script would, and keeps what it printed."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from finetune.cli import app


@dataclass(frozen=True)
class Ran:
    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as the one JSON document it must be."""
        return json.loads(self.stdout)


def run_finetune(*args: object, app: typer.Typer = app) -> Ran:
    """Exit status and output of `finetune ARGS`; errors that are not the user's come through as exceptions.

    Args:
        app: another command line, such as that of `python -m bench`.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = app([str(arg) for arg in args], standalone_mode=False) or 0
        except typer.Exit as stop:
            status = stop.exit_code
    return Ran(int(status), out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes; None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(folder: Path, *args: object, says: tuple[str, ...], app: typer.Typer = app) -> Ran:
    """Runs a command that must be refused with a message that holds these words, and must leave `folder` as it is."""
    before = contents(folder)
    ran = run_finetune(*args, app=app)
    assert ran.status == 2, ran.stderr
    message = ran.stderr[ran.stderr.index("error: ") :]
    for words in says:
        assert words in message
    assert "Traceback" not in ran.stderr + ran.stdout
    assert contents(folder) == before
    return ran
