"""From the body of a request to what the engine is asked, off the event loop.

Why: encoding is the one costly thing that a client can ask for before anything else limits it. How: what is certain to
be too long is refused by its count of messages and characters, before a template sees it; long bodies are worked on one
after the other on a thread of their own, so that short ones never wait for them.

Leaves out processes: the tokenizer works without the interpreter's lock, and the rest of the longest body that passes
the bounds takes tenths of a second.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from finetune.infer import Request
from finetune.serve.asked import Asked, ChatAsked, CompletionAsked, read_asked
from finetune.serve.desk import Desk
from finetune.serve.prompts import Prompts

if TYPE_CHECKING:
    AskedKind = type[ChatAsked] | type[CompletionAsked]

SHORT_BYTES = 64 * 2**10  # takes some 20 ms
CONTAINERS = 20_000


class Encoding:
    """Turns bodies into requests, the short ones beside the long ones."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._prompts = {name: Prompts(desk.engine, name) for name in desk.engine.names}
        self._short, self._long = ThreadPoolExecutor(1, "encoding"), ThreadPoolExecutor(1, "encoding-long")

    async def understand(self, body: bytes, kind: AskedKind) -> tuple[Asked, list[Request]]:
        """What a body asks of the engine, prompt by prompt, `n` requests for each.

        Raises:
            Refusal: a body that cannot be understood, an unknown model, a prompt that is too long.
        """
        lane = self._short if len(body) <= SHORT_BYTES else self._long
        return await asyncio.get_running_loop().run_in_executor(lane, self._understand, body, kind)

    def _understand(self, body: bytes, kind: AskedKind) -> tuple[Asked, list[Request]]:
        asked = read_asked(body, kind, containers=max(CONTAINERS, 2 * self._desk.engine.max_length))
        model = self._desk.require_model(asked.model)
        made = self._prompts[model]
        if isinstance(asked, ChatAsked):
            self._desk.require_capacity(asked.n or 1)
            ids, continues = made.of_messages(asked.messages, continues=asked.continues())
            prompts = [ids]
        else:
            assert isinstance(asked, CompletionAsked)
            continues = True
            texts = made.forms(asked.prompt)
            self._desk.require_capacity(len(texts) * (asked.n or 1))
            prompts = [made.of_completion(one) for one in texts]
        samplings = asked.samplings()
        requests = []
        for ids in prompts:
            after = self._desk.engine.prompt_end(ids, model) if continues else None  # once for all its answers
            requests += [Request(ids, sampling, model, after) for sampling in samplings]
        return asked, requests
