"""The commands of the terminal: lines that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from finetune.chat.screen import Screen
from finetune.chat.session import Session, shown, with_settings
from finetune.errors import DataError
from finetune.infer import Request

HELP = (
    ("/help", "these lines"),
    ("/reset", "forget the conversation; the system message stays"),
    ("/system TEXT", "set the system message; without TEXT, remove it"),
    ("/model NAME", "switch to another model; without NAME, list them"),
    (
        "/set NAME=VALUE ...",
        "change how tokens are sampled, as in /set temperature=0.7 top_p=0.9; alone, show the settings",
    ),
    ("/retry", "ask the last question again; above temperature 0 the answer will differ"),
    ("/save FILE", "write the conversation as a line of training data; /save! FILE replaces a file"),
    ("/load FILE", "continue the first conversation of a file"),
    ("/exit", "leave, as Ctrl-D does"),
    ("//text", "a question that begins with a slash"),
    ('"""text', 'a question of several lines, up to """'),
)


class Commands:
    """Runs commands on a session.

    Attributes:
        leaving: whether the user asked to leave.
    """

    def __init__(self, session: Session, screen: Screen):
        self._session, self._screen = session, screen
        self.leaving = False
        self._named: dict[str, Callable[[str], Request | None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/model": self._model,
            "/set": self._set,
            "/retry": self._retry,
            "/save": self._save,
            "/save!": partial(self._save, replace=True),
            "/load": self._load,
            "/exit": self._exit,
        }

    def run(self, line: str) -> Request | None:
        """Runs one command line.

        Returns:
            The request to answer next, if the command asks for one.

        Raises:
            FinetuneError: there is no such command, or it cannot be done; nothing has changed.
        """
        if line.startswith("//"):
            return self._session.ask(line[1:])
        name, *rest = line.split(maxsplit=1)
        if name not in self._named:
            near = difflib.get_close_matches(name, self._named, n=1)
            raise DataError(
                f"there is no command {name}",
                allowed=", ".join(self._named),
                fix=(f"did you mean {near[0]}?" if near else "/help says what each does")
                + "; a question that begins with a slash is written with two",
            )
        return self._named[name](rest[0].strip() if rest else "")

    def _help(self, _: str) -> None:
        self._screen.table(HELP)

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._screen.say("a new conversation")

    def _system(self, text: str) -> None:
        self._session.tell_system(text or None)
        self._screen.say("the system message is set" if text else "no system message")

    def _model(self, name: str) -> None:
        if name:
            self._session.choose(name)
        self._screen.say(f"model: {self._session.model} (available: {', '.join(self._session.engine.names)})")

    def _set(self, text: str) -> None:
        self._session.sampling = with_settings(self._session.sampling, text.split())
        self._screen.say(shown(self._session.sampling))

    def _retry(self, _: str) -> Request:
        return self._session.ask_again()

    def _save(self, name: str, *, replace: bool = False) -> None:
        path = _file(name, "/save")
        self._session.save(path, replace=replace)
        turns = len(self._session.conversation.turns)
        self._screen.say(f"saved {turns} question{'s' * (turns > 1)} with answers in {path}")

    def _load(self, name: str) -> None:
        self._session.load(_file(name, "/load"))
        for question, answer in self._session.conversation.turns:
            self._screen.say(f"> {question}")
            self._screen.write(answer + "\n")

    def _exit(self, _: str) -> None:
        self.leaving = True


def _file(name: str, command: str) -> Path:
    if not name:
        raise DataError("no file name was given", where=command, fix=f"write {command} FILE")
    return Path(name).expanduser()
