"""What every request passes: the key, and the count by status."""

from __future__ import annotations

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serve.desk import Desk
from finetune.serve.refusal import Refusal

ENDPOINTS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics")
_LEFT = 499  # nginx's status of a client that left before its response began


class Gate:
    """Stands around an application.

    Args:
        key: what a client has to show, except to /health; None: nothing.
    """

    def __init__(self, app: ASGIApp, desk: Desk, *, key: bytes | None):
        self._app, self._desk, self._key = app, desk, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "websockets and lifespan are off"
        status = _LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._key is None or scope["path"] == "/health" or self._shows_key(scope):
                await self._app(scope, receive, watched)
            else:
                refusal = Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
                await refused(refusal)(scope, receive, watched)
        finally:
            self._desk.metrics.count(_endpoint(scope["path"]), status)

    def _shows_key(self, scope: Scope) -> bool:
        assert self._key is not None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, shown = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), self._key)


def refused(refusal: Refusal) -> Response:
    """The response to what is refused."""
    return Response(refusal.body(), refusal.status, refusal.headers(), "application/json")


def _endpoint(path: str) -> str:
    """A label of few values, whatever is asked for."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ENDPOINTS else "other"
