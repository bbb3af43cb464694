"""The paths: models, the two completions, health and metrics.

A body is read here piece by piece, so that one that is too large is refused before it is in memory. `encoding.py` makes
of it what the engine is asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from finetune.serve.asked import ChatAsked, CompletionAsked
from finetune.serve.chat_form import ChatForm
from finetune.serve.completion_form import CompletionForm
from finetune.serve.desk import Desk
from finetune.serve.encoding import Encoding
from finetune.serve.gate import Gate, refused
from finetune.serve.refusal import Refusal
from finetune.serve.replies import StreamedReply, WholeReply
from finetune.serve.token_texts import TokenTexts

BODY_SECONDS = 60.0


def make_app(
    desk: Desk,
    *,
    max_body_bytes: int,
    key: bytes | None,
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> ASGIApp:
    """The application around a desk.

    Args:
        max_body_bytes: of one request.
        key, hosts, origins: see `Gate`.
    """
    engine, created = desk.engine, int(time.time())
    texts = {name: TokenTexts(engine.tokenizer_of(name)) for name in engine.names}
    encoding = Encoding(desk)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    def told(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": created, "owned_by": "moe-qlora"}
        return {**about, "max_model_len": engine.max_length}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [told(name) for name in engine.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(told(desk.require_model(name)))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(desk.health())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await reply(request, ChatAsked)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await reply(request, CompletionAsked)

    async def reply(request: Request, kind: type[ChatAsked] | type[CompletionAsked]) -> Response:
        began = time.monotonic()
        with desk.entering():
            try:
                body = await _read_body(request, max_body_bytes)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            with desk.holding_a_place():
                asked, requests = await encoding.understand(body, kind)
        answers = desk.submit(requests, live=bool(asked.stream), began=began)
        with_logprobs = requests[0].sampling.logprobs is not None
        model = desk.require_model(asked.model)
        form = (ChatForm if kind is ChatAsked else CompletionForm)(texts[model], told=with_logprobs)
        common: dict[str, Any] = {"model": model, "choices": asked.n or 1, "told": with_logprobs}
        if not asked.stream:
            return WholeReply(desk, answers, form, **common)
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return StreamedReply(desk, answers, form, usage=usage, **common)

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refused(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path:.200}"
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        response = refused(Refusal(error.status_code, f"{asked}: {error.detail}", code=codes.get(error.status_code)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return refused(Refusal(500, "an error in the server; its log has more", code="internal_error"))

    return Gate(app, desk, key=key, hosts=hosts, origins=origins)


async def _read_body(request: Request, limit: int) -> bytes:
    """The request's body.

    Raises:
        Refusal: it is not JSON by its headers, larger than `limit` bytes, or takes longer than `BODY_SECONDS`.
        ClientDisconnect: the client left.
    """
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    charset = parameters.strip().partition("charset=")[2].strip("\"' ") or "utf-8"
    coding = request.headers.get("content-encoding", "identity").lower()
    for name, value, allowed, fix in (
        # A page in a browser may send other types to this machine without asking it first.
        ("content-type", kind.strip(), ("application/json",), "send the header content-type: application/json"),
        ("charset", charset, ("utf-8", "utf8", "us-ascii", "ascii"), "send the body as UTF-8"),
        ("content-encoding", coding, ("identity",), "send the body uncompressed, without this header"),
    ):
        if value not in allowed:
            message = f"the {name} is {value!r:.80}; allowed: {allowed[0]}; {fix}"
            raise Refusal(415, message, code="unsupported_media_type")
    too_large = Refusal(413, f"the body is too large; allowed: {limit} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the body took longer than {BODY_SECONDS:.0f} s", code="request_timeout") from None
    return bytes(body)
