"""The terminal as a process: through a pipe as a script has it, and through a pseudo-terminal with Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.chat.screen import Screen
from finetune.chat.terminal import chat_in_terminal
from finetune.errors import EngineError
from finetune.infer.request import Event, Request
from tests.chat.conftest import Talk
from tests.chat.fake import FakeHandle
from tests.conftest import REPOSITORY

TALKING = [sys.executable, "-m", "tests.chat.talking"]
SPEED = re.compile(r"^\d+ tokens?(, [\d.]+ tokens/s)?", re.MULTILINE)


def test_a_script_gets_answers_and_nothing_else(tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    lines = [
        b"Hello there",
        b"",
        b"//slash",
        b"/model base",
        b'"""one',
        b'two"""',
        b"/set temperature=400",
        b"bytes \xff and \x1b[2J",
        b"/save " + bytes(saved),
    ]
    # The strictest that a locale can be: bytes that are no text would be an error.
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    given = b"".join(line + b"\n" for line in lines)
    done = subprocess.run(TALKING, input=given, cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    assert done.returncode == 0, err  # the end of input
    assert out == "tuned: Hello there\ntuned: /slash\nbase: one two\nbase: bytes \ufffd and \\x1b[2J\n"
    assert "\x1b" not in out + err
    assert len(SPEED.findall(err)) == 4
    assert "error: temperature is 400.0" in err
    [line] = saved.read_text(encoding="utf-8").splitlines()
    assert [message["content"] for message in json.loads(line)["messages"]] == [
        "Hello there", "tuned: Hello there", "/slash", "tuned: /slash", "one\ntwo", "base: one two",
        "bytes \ufffd and \x1b[2J", "base: bytes \ufffd and \x1b[2J",
    ]  # fmt: skip


def test_an_engine_that_failed_is_told_and_what_was_said_can_still_be_saved(talk: Talk, tmp_path: Path) -> None:
    engine: Any = talk.engine
    submit, failure = (
        engine.submit,
        EngineError("the engine failed while it answered: out of memory", fix="start it again"),
    )

    def dying(request: Request, listen: Callable[[Event], None]) -> FakeHandle:
        def hear(event: Event) -> None:
            listen(event)
            engine.failure = failure if len(engine.requests) == 2 else None

        return submit(request, hear)

    engine.submit = dying
    saved = tmp_path / "said.jsonl"
    lines = "".join(f"{line}\n" for line in ("one", "two three", "four", f"/save {saved}"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(EngineError) as caught:
        chat_in_terminal(talk.session, Screen(io.StringIO(lines), out, err))
    assert caught.value is failure
    assert out.getvalue() == "tuned: one\ntuned:\n"
    assert err.getvalue().count("error: the engine failed while it answered: out of memory\n  fix: start it again") == 2
    assert "saved 1 question" in err.getvalue()


class Terminal:
    """A process at a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str):
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.chdir(REPOSITORY)
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started the tests in the background
            os.execv(TALKING[0], [*TALKING, *arguments])
        self.seen = ""

    def until(self, text: str, *, times: int = 1) -> None:
        """Reads on until a text stands there so many times."""
        deadline = time.monotonic() + 60
        while self.seen.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            self._read()

    def type(self, text: str) -> None:
        os.write(self._file, text.encode("utf-8"))

    def press(self, key: str, until: str) -> None:
        """Presses a key until a text stands there once more.

        Again after a while: a signal between Python's last look and its wait for a key goes unseen.
        """
        times = self.seen.count(until) + 1
        for _ in range(60):
            self.type(key)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                self._read()
                if self.seen.count(until) >= times:
                    return
        raise AssertionError(f"no {until!r} in {self.seen!r}")

    def status(self, *, again: str = "") -> int:
        """The exit status of the process, which is leaving; a key may have to be pressed again, see `press`."""
        for _ in range(60):
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                self._read()
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    os.close(self._file)
                    return os.waitstatus_to_exitcode(status)
            self.type(again)
        os.kill(self._pid, signal.SIGKILL)
        raise AssertionError(f"still there: {self.seen!r}")

    def _read(self) -> None:
        if select.select([self._file], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):  # the process has ended
                self.seen += os.read(self._file, 65536).decode("utf-8", "replace")


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    terminal = Terminal("0.15")
    terminal.until("> ")
    terminal.type("one two three four five six seven eight nine ten\n")
    terminal.until("tuned: one two")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.type("hi\n")
    terminal.until("tuned: hi")
    terminal.until("tokens/s", times=2)
    terminal.type(f"/save {saved}\n")
    terminal.until("saved 2 questions")
    terminal.until("\n> ", times=4)
    terminal.press("\x03", "Leave? y or Ctrl-C leaves")  # nothing is unsaved
    terminal.type("y\n")
    assert terminal.status() == 0
    assert "Save the conversation" not in terminal.seen
    assert "\x1b[2m" in terminal.seen  # the line about speed is dim
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert messages[1]["content"].startswith("tuned: one two")
    assert "ten" not in messages[1]["content"]
    assert [message["content"] for message in messages[2:]] == ["hi", "tuned: hi"]


def test_ctrl_c_at_the_prompt_asks_and_a_second_one_leaves() -> None:
    terminal = Terminal()
    terminal.until("> ")
    terminal.press("\x03", "Leave? y or Ctrl-C leaves, Enter stays: ")
    terminal.type("\n")
    terminal.until("\n> ")
    terminal.type("hi\n")
    terminal.until("tuned: hi")
    terminal.until("\n> ", times=2)
    terminal.press("\x03", "Leave, and the conversation is not saved?")
    terminal.type("\x03")
    assert terminal.status(again="\x03") == 0
    assert "Save the conversation" not in terminal.seen


@pytest.mark.parametrize("leave", ["\x04", "/exit\n"])
def test_leaving_an_unsaved_conversation_offers_to_save_it(tmp_path: Path, leave: str) -> None:
    taken, saved = tmp_path / "taken.jsonl", tmp_path / "said.jsonl"
    taken.write_text("mine\n")
    terminal = Terminal()
    terminal.until("> ")
    terminal.type("hi\n")
    terminal.until("tuned: hi")
    terminal.until("\n> ")
    terminal.press(leave, "Save the conversation? /save FILE, or Enter leaves without saving: ")
    for answer, says in ((str(taken), "the file exists already"), ("yes", "no file name was given")):
        terminal.press(f"{answer}\n", says)
        terminal.until("Save the conversation?", times=terminal.seen.count("error: ") + 1)
    terminal.type(f"/save {saved}\n")
    assert terminal.status() == 0
    assert taken.read_text() == "mine\n"
    assert [message["content"] for message in json.loads(saved.read_text())["messages"]] == ["hi", "tuned: hi"]


def test_a_conversation_that_need_not_be_kept_is_left_by_enter() -> None:
    terminal = Terminal()
    terminal.until("> ")
    terminal.type("hi\n")
    terminal.until("tuned: hi")
    terminal.until("\n> ")
    terminal.press("\x04", "Save the conversation?")
    terminal.type("\n")
    assert terminal.status() == 0


def test_ctrl_c_ends_a_script_without_a_question() -> None:
    pipe: Any = subprocess.PIPE
    with subprocess.Popen(
        TALKING,
        cwd=REPOSITORY,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # see Terminal
    ) as process:
        assert process.stderr is not None
        assert "/help lists the commands" in process.stderr.readline()
        time.sleep(0.3)  # until it reads
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""
