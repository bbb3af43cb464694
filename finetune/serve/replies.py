"""Sends answers: as one document, or piece by piece as server-sent events.

Plain ASGI, because a client that disconnects must be noticed while its answer is generated. A chunk costs one
`json.dumps` of a small dict; the bytes around it are made once.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from finetune.infer import FinishedEvent, TokenEvent
from finetune.serve.admission import Admission
from finetune.serve.answers import Answers
from finetune.serve.api_error import APIError
from finetune.serve.choices import ChatChoices, CompletionChoices

Form = ChatChoices | CompletionChoices


class Reply(Response):
    """The response to a request whose answers are being generated.

    Args:
        model: the model name in the response.
        n: the number of answers to each prompt; `answers` holds them prompt by prompt.
    """

    def __init__(self, admission: Admission, answers: Answers, form: Form, *, model: str, n: int, with_logprobs: bool):
        super().__init__()
        self._gone = False
        self._admission, self._answers, self._form = admission, answers, form
        self._n, self._with_logprobs = n, with_logprobs
        self._document = {
            "id": form.id_prefix + uuid.uuid4().hex,
            "object": form.piece_object if answers.live else form.whole_object,
            "created": int(time.time()),
            "model": model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._cancel_when_gone(receive))
        try:
            await self._reply(scope, receive, send)
        finally:
            watch.cancel()
            self._answers.cancel()

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _cancel_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._answers.cancel()

    def _usage(self) -> dict[str, int]:
        """The `usage` object: each prompt counts once, and all answers."""
        ends = [answer.finished for answer in self._answers.all]
        prompt = sum(end.prompt_tokens for end in ends[:: self._n] if end is not None)
        completion = sum(end.completion_tokens for end in ends if end is not None)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _broken_off(self) -> APIError | None:
        """Why an answer was not finished, unless its client left; None if all were finished."""
        ends = [answer.finished for answer in self._answers.all]
        broken = [end for end in ends if end is not None and end.reason in ("cancelled", "error")]
        if not broken:
            return None
        if self._admission.engine.failure is not None:
            return APIError(503, "the engine failed while it answered", code="engine_failed")
        if broken[0].error is not None:
            return APIError(500, broken[0].error.what, code="engine_error")
        return APIError(503, "the server stopped while it answered", code="stopping")


class WholeReply(Reply):
    """All answers in one document."""

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._answers.all]
        tokens: list[list[TokenEvent]] = [[] for _ in self._answers.all]
        while batch := await self._answers.batch():
            for number, event in batch:
                texts[number].append(event.text)
                if self._with_logprobs and isinstance(event, TokenEvent):
                    tokens[number].append(event)
        if self._gone:
            return
        if (error := self._broken_off()) is not None:
            await error.response()(scope, receive, send)
            return
        choices = []
        for answer in self._answers.all:
            assert answer.finished is not None
            number = answer.number
            text = "".join(texts[number])
            choices.append(self._form.whole(number, text, tokens[number], answer.finished.reason))
        document = {**self._document, "choices": choices, "usage": self._usage()}
        await Response(json.dumps(document).encode("ascii"), media_type="application/json")(scope, receive, send)


class StreamedReply(Reply):
    """Chunks as server-sent events, then `[DONE]`.

    Args:
        usage: whether a last chunk tells the usage.
    """

    def __init__(self, *args: Any, usage: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._with_usage = usage
        self._head = b"data: " + json.dumps(self._document).encode("ascii")[:-1] + b', "choices": ['
        self._tail = b'], "usage": null}\n\n' if usage else b"]}\n\n"

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        # A proxy that buffers would hold the pieces back.
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        openings = [self._form.opening(answer.number) for answer in self._answers.all]
        data = b"".join([self._piece(opening) for opening in openings if opening is not None])
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        while batch := await self._answers.batch():
            data = self._pieces(batch)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": self._end(), "more_body": False})

    def _pieces(self, batch: list[tuple[int, TokenEvent | FinishedEvent]]) -> bytes:
        """The events as chunks; tokens of one answer that arrived together make one chunk."""
        texts: dict[int, str] = {}
        tokens: dict[int, list[TokenEvent]] = {}
        ends: dict[int, FinishedEvent] = {}
        for number, event in batch:
            texts[number] = texts.get(number, "") + event.text
            if isinstance(event, FinishedEvent):
                ends[number] = event
            elif self._with_logprobs:
                tokens.setdefault(number, []).append(event)
        pieces = []
        for number, text in texts.items():
            of_text, end = tokens.get(number, ()), ends.get(number)
            if end is not None and end.reason in ("cancelled", "error"):
                continue
            if text or of_text or end is not None:
                pieces.append(self._piece(self._form.piece(number, text, of_text, None if end is None else end.reason)))
        return b"".join(pieces)

    def _piece(self, choice: dict[str, Any]) -> bytes:
        return self._head + json.dumps(choice).encode("ascii") + self._tail

    def _end(self) -> bytes:
        if (error := self._broken_off()) is not None:
            return b"data: " + error.body() + b"\n\n"
        usage = b""
        if self._with_usage:
            document = {**self._document, "choices": [], "usage": self._usage()}
            usage = b"data: " + json.dumps(document).encode("ascii") + b"\n\n"
        return usage + b"data: [DONE]\n\n"
