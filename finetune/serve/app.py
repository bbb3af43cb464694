"""The endpoints: models, the two completions, health and metrics.

A body is read piece by piece, so that one that is too large is refused before it is in memory. `prompts.py` turns it
into requests to the engine.
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

from finetune.serve.admission import Admission
from finetune.serve.api_error import APIError
from finetune.serve.auth import AuthMiddleware
from finetune.serve.choices import ChatChoices, CompletionChoices
from finetune.serve.prompts import Encoding
from finetune.serve.replies import StreamedReply, WholeReply
from finetune.serve.request_body import ChatCompletionRequest, CompletionRequest
from finetune.serve.token_texts import TokenTexts

BODY_SECONDS = 60.0


def make_app(
    admission: Admission,
    *,
    max_body_bytes: int,
    key: bytes | None,
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> ASGIApp:
    """Builds the ASGI application.

    Args:
        max_body_bytes: the largest body of a request.
        key, hosts, origins: see `AuthMiddleware`.
    """
    engine, created = admission.engine, int(time.time())
    texts = {name: TokenTexts(engine.tokenizer_of(name)) for name in engine.names}
    encoding = Encoding(admission)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    def about(name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "moe-qlora"}
        return {**model, "max_model_len": engine.max_length}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about(name) for name in engine.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(about(admission.require_model(name)))

    @app.get("/health")
    async def health() -> Response:
        admission.require_service()
        # How often an error of the engine itself ended all running answers.
        restarts = {"engine_restarts": engine.restarts} if engine.restarts else {}
        return JSONResponse({"status": "ok", **restarts})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(admission.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await reply(request, ChatCompletionRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await reply(request, CompletionRequest)

    async def reply(request: Request, kind: type[ChatCompletionRequest] | type[CompletionRequest]) -> Response:
        began = time.monotonic()
        with admission.entering():
            try:
                body = await _read_body(request, max_body_bytes)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            with admission.holding_a_place():
                parsed, requests = await encoding.understand(body, kind)
        answers = admission.submit(requests, live=bool(parsed.stream), began=began)
        with_logprobs = requests[0].sampling.logprobs is not None
        model = admission.require_model(parsed.model)
        form = (ChatChoices if kind is ChatCompletionRequest else CompletionChoices)(texts[model])
        common: dict[str, Any] = {"model": model, "n": parsed.n or 1, "with_logprobs": with_logprobs}
        if not parsed.stream:
            return WholeReply(admission, answers, form, **common)
        usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
        return StreamedReply(admission, answers, form, usage=usage, **common)

    @app.exception_handler(APIError)
    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path:.200}"
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        code = codes.get(error.status_code)
        response = APIError(error.status_code, f"{asked}: {error.detail}", code=code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return APIError(500, "an error in the server; its log has more", code="internal_error").response()

    return AuthMiddleware(app, admission, key=key, hosts=hosts, origins=origins)


async def _read_body(request: Request, limit: int) -> bytes:
    """Reads the body of a request.

    Raises:
        APIError: its headers say it is not JSON, it is larger than `limit` bytes, or takes longer than `BODY_SECONDS`.
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
            raise APIError(415, message, code="unsupported_media_type")
    too_large = APIError(413, f"the body is too large; allowed: {limit} bytes", code="request_too_large")
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
        raise APIError(408, f"the body took longer than {BODY_SECONDS:.0f} s", code="request_timeout") from None
    return bytes(body)
