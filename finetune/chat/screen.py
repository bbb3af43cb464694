"""What the terminal shows: answers on standard output, all else on standard error, so that a script gets answers.

Text of a model may hold anything, also sequences that repaint a terminal; characters that nobody would see are written
out (`\\x1b`). Colours are for terminals: rich leaves them out of files and pipes.
"""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.data import visible
from finetune.errors import FinetuneError

_BLOCK = '"""'


class Screen:
    """Reads lines and writes text.

    Args:
        stdin, stdout, stderr: where.

    Attributes:
        is_terminal: whether standard input and output are one; only there a prompt is shown and lines can be edited.
    """

    def __init__(self, stdin: TextIO, stdout: TextIO, stderr: TextIO):
        self._stdin, self._stdout = stdin, stdout
        self._console = Console(file=stderr, highlight=False, markup=False, emoji=False)
        for stream in (stdin, stdout):
            if isinstance(stream, io.TextIOWrapper):
                # Neither bytes that are no text nor characters that the terminal has not end the talk.
                stream.reconfigure(errors="surrogateescape" if stream is stdin else "replace")
        self.is_terminal = stdin.isatty() and stdout.isatty()
        if self.is_terminal:
            with contextlib.suppress(ImportError):  # lines are edited, and earlier ones found, where there is readline
                import readline  # noqa: F401

    def ask(self) -> str:
        """Reads what the user says next; a block between triple quotes is one message.

        Raises:
            EOFError: there is no more.
            KeyboardInterrupt: Ctrl-C.
        """
        line = self._line("> ")
        if not line.startswith(_BLOCK):
            return line
        block = line.removeprefix(_BLOCK)
        while not block.endswith(_BLOCK):
            block += "\n" + self._line(". ")
        return block.removesuffix(_BLOCK)

    def question(self, text: str) -> str:
        """The answer to a question at a terminal, without spaces around it; raises as `ask`."""
        return self._line(text).strip()

    def write(self, text: str) -> None:
        """Writes a piece of an answer."""
        self._stdout.write(visible(text))
        self._stdout.flush()

    def say(self, text: str) -> None:
        """Writes a line about the conversation."""
        self._console.print(Text(visible(text)), style="dim", soft_wrap=True)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, text in rows:
            table.add_row(Text(name, style="bold"), Text(visible(text)))
        self._console.print(table)

    def refuse(self, error: FinetuneError) -> None:
        """Reports a mistake; the conversation continues."""
        self._console.print(Text(visible(f"error: {error}"), style="red"), soft_wrap=True)

    def _line(self, prompt: str) -> str:
        if self.is_terminal:
            # `input` edits lines only on the standard streams themselves; commands let standard output go elsewhere.
            with contextlib.redirect_stdout(self._stdout):
                line = input(prompt)
        else:
            line = self._stdin.readline()
            if not line:
                raise EOFError
            line = line.removesuffix("\n")
        # Bytes that are no UTF-8 come as lone surrogates, which neither a tokenizer nor a file takes.
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Makes Ctrl-C call `stop` inside the block; a second one raises KeyboardInterrupt, should the first do nothing."""

    def interrupted(_signal: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
