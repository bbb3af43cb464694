"""`finetune chat` on the fake engine as a process of its own: `python -m tests.chat.talking [DELAY]`."""

from __future__ import annotations

import sys
from typing import Any

from finetune.chat.screen import Screen
from finetune.chat.session import Session
from finetune.chat.terminal import chat_in_terminal
from finetune.infer.request import Sampling
from tests.chat.fake import FakeEngine

if __name__ == "__main__":
    engine: Any = FakeEngine(delay=float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
    chat_in_terminal(Session(engine, Sampling(), "tuned"), Screen(sys.stdin, sys.stdout, sys.stderr))
