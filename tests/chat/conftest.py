"""Talks in this process, on the fake engine."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest

from finetune.chat.screen import Screen
from finetune.chat.session import Session
from finetune.chat.terminal import chat_in_terminal
from finetune.infer.request import Sampling
from tests.chat.fake import FakeEngine


@dataclass
class Talk:
    """A conversation in this process with the fake engine."""

    engine: FakeEngine
    session: Session

    def say(self, *lines: str) -> tuple[str, str]:
        """What these lines bring to standard output and to standard error."""
        out, err = io.StringIO(), io.StringIO()
        chat_in_terminal(self.session, Screen(io.StringIO("".join(f"{line}\n" for line in lines)), out, err))
        # The greeting and the end of input take a line each.
        return out.getvalue(), err.getvalue().split("\n", 1)[1].rstrip("\n")


@pytest.fixture
def talk() -> Talk:
    engine: Any = FakeEngine()
    return Talk(engine, Session(engine, Sampling(), "tuned"))
