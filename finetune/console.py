"""Where words go: reports to standard output, logs and progress to standard error.

With --json, standard output carries one JSON document and nothing else, also if a library prints.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


class Report:
    """Tables and lines for people, or one JSON document for programs.

    Args:
        as_json: collect instead of print; `finish` then prints the document.
    """

    def __init__(self, *, as_json: bool = False):
        self.as_json = as_json
        self.stdout = sys.stdout
        # No markup: an answer may hold "[/INST]", a path brackets.
        self._console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, markup=False, emoji=False)
        if not self._console.is_terminal and "COLUMNS" not in os.environ:
            self._console.width = 120  # a file or a pipe

    def line(self, text: str = "") -> None:
        # A terminal breaks long lines by itself, and a file wants them whole.
        self._console.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is left-aligned and whose others are right-aligned.

        Lines break between words, never within one: a path stays whole, even where the table is then wider than the
        terminal.
        """
        table = Table()
        for index, (name, *cells) in enumerate(zip(columns, *rows, strict=True)):
            longest = max(cell_len(word) for text in (name, *cells) for word in text.split() or [""])
            table.add_column(name, justify="left" if index == 0 else "right", min_width=longest)
        self._print(title, table, rows)

    def prose_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts, all left-aligned, with a line between the rows; only the columns' names stay whole."""
        table = Table(show_lines=True)
        for name in columns:
            table.add_column(name, overflow="fold", min_width=cell_len(name))
        self._print(title, table, rows)

    def _print(self, title: str, table: Table, rows: Sequence[Sequence[str]]) -> None:
        for row in rows:
            table.add_row(*row)
        self._console.print(title, style="bold", soft_wrap=True)
        width = self._console.width
        # A line and two spaces for each column.
        self._console.width = max(width, 1 + sum(3 + (column.min_width or 0) for column in table.columns))
        self._console.print(table, crop=False)
        self._console.width = width

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While it lasts, whatever a library prints goes to standard error."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def finish(self, document: Mapping[str, Any]) -> None:
        """Prints the document if this report is JSON."""
        if self.as_json:
            json.dump(strict_json(document), self.stdout, indent=2, allow_nan=False)
            self.stdout.write("\n")
            self.stdout.flush()


def gib(size: float) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def strict_json(value: Any) -> Any:
    """The value as strict JSON: non-finite floats become null, numpy's numbers become Python's."""
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value
