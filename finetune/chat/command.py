"""The command `finetune chat`: loads the engine, and talks in the terminal or on a page."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from finetune.chat.screen import Screen
from finetune.chat.session import Session
from finetune.chat.terminal import chat_in_terminal
from finetune.console import Report
from finetune.infer import Engine, Sampling

_PAGE_BATCH = 8  # answers at once: four tabs with two models
LoadEngine = Callable[[int], Engine]  # of so many answers at once; raises as `Engine.load`


def talk(load: LoadEngine, sampling: Sampling, system: str | None, report: Report) -> None:
    """Talks in the terminal until the user leaves.

    Args:
        system: what the model is told before the conversation.

    Raises:
        FinetuneError: an adapter or model that cannot be used, or a template that takes no system message.
        EngineError: the engine failed for good.
    """
    with load(1) as engine:
        session = Session(engine, sampling, engine.names[0])
        if system:
            session.tell_system(system)
        chat_in_terminal(session, Screen(sys.stdin, report.stdout, sys.stderr))


def talk_on_page(
    load: LoadEngine, sampling: Sampling, system: str | None, report: Report, *, host: str, port: int
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        system: as `talk`.
        host: address to listen on.
        port: 0 for any that is free.

    Raises:
        FinetuneError: an adapter or model that cannot be used, or an address that cannot be had.
        EngineError: the engine failed for good.
    """
    from finetune.chat.page import Page
    from finetune.chat.page_server import PageServer
    from finetune.web import bind, is_local, listen

    with contextlib.closing(bind(host, port)) as bound:
        if not is_local(bound):
            report.line(f"warning: whoever reaches {host} can use this page")
        with load(_PAGE_BATCH) as engine:
            page = Page(engine, sampling, system)
            server = PageServer(page.build(), bound, stop=page.stop_all)
            listen(bound)
            report.line(f"chat with {', '.join(engine.names)} on {server.url} (Ctrl-C ends)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_page()
            if engine.failure is not None:
                raise engine.failure
