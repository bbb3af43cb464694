"""The command `finetune chat`: checks what it was given, loads the engine, and talks in the terminal or on a page."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.chat.screen import Screen
from finetune.chat.session import Session
from finetune.chat.terminal import chat_in_terminal
from finetune.console import Report
from finetune.infer import Engine, EngineSettings, Sampling, parse_adapters

_PAGE_BATCH = 8  # answers at once: four tabs with two models


@dataclass(frozen=True)
class ChatOptions:
    """What both faces are given.

    Attributes:
        path: model or adapter folder, or hub id.
        adapters: `NAME=PATH`, each a further model.
        base: of an adapter, where it has moved since training.
        system: what the model is told before the conversation.
        settings: the engine's; each face sets its own batch.
    """

    path: str
    adapters: Sequence[str]
    base: str | None
    device: str
    sampling: Sampling
    system: str | None
    settings: EngineSettings

    def load(self, *, max_batch: int) -> Engine:
        """Raises a FinetuneError for an adapter or model that cannot be used."""
        return Engine.load(
            self.path,
            adapters=parse_adapters(self.adapters),
            base=self.base,
            device=self.device,
            settings=replace(self.settings, max_batch=max_batch),
        )


def talk(options: ChatOptions, report: Report) -> None:
    """Talks in the terminal until the user leaves.

    Raises:
        FinetuneError: an adapter or model that cannot be used, or a template that takes no system message.
        EngineError: the engine failed for good.
    """
    with options.load(max_batch=1) as engine:
        session = Session(engine, options.sampling, engine.names[0])
        if options.system:
            session.tell_system(options.system)
        chat_in_terminal(session, Screen(sys.stdin, report.stdout, sys.stderr))


def talk_on_page(options: ChatOptions, report: Report, *, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Args:
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
        with options.load(max_batch=_PAGE_BATCH) as engine:
            page = Page(engine, options.sampling, options.system)
            server = PageServer(page.build(), bound, stop=page.stop_all)
            listen(bound)
            report.line(f"chat with {', '.join(engine.names)} on {server.url} (Ctrl-C ends)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_page()
            if engine.failure is not None:
                raise engine.failure
