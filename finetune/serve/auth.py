"""What every request passes through: the checks of host name, origin and API key, and the count by status.

Without a key, on an address that only this machine can reach, web pages must be kept out (DNS rebinding): the Host
header has to name this machine (see `web/addresses.py`). With a key, or on an address that others can reach, any name
is accepted unless `--allowed-host` lists them: no page knows the key, and only others know what they call this machine.

`--cors-origin` allows pages of another origin; without it no CORS header is sent, and a preflight is refused.
"""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.errors import FinetuneError
from finetune.serve.admission import Admission
from finetune.serve.api_error import APIError
from finetune.web import host_name, is_local, is_local_name

ENDPOINTS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics")
_LEFT = 499  # nginx's status of a client that left before its response began
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", re.IGNORECASE)
_PREFLIGHT_SECONDS = 600  # how long a browser may remember an answer


class AuthMiddleware:
    """Wraps an application.

    Args:
        key: the API key that clients must send, except to /health; None: no key is needed.
        hosts: names allowed in a Host header besides this machine's own; None: any.
        origins: origins whose pages may send requests; `*` for all.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        *,
        key: bytes | None,
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
    ):
        self._app, self._admission, self._key, self._hosts, self._origins = app, admission, key, hosts, origins
        self._inner: ASGIApp = self._with_key
        if origins:
            self._inner = CORSMiddleware(
                self._with_key,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                allow_private_network=True,
                max_age=_PREFLIGHT_SECONDS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "websockets and lifespan are off"
        status = _LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._error(scope)
            await (self._inner if error is None else error.response())(scope, receive, watched)
        finally:
            self._admission.metrics.count(_endpoint(scope["path"]), status)

    def _error(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        if self._hosts is not None:
            given = headers.getlist("host")
            name = host_name(given[0]) if len(given) == 1 else None
            if name is None or not (is_local_name(name) or name in self._hosts):
                shown = ", ".join(given) or "missing"
                message = f"the Host header is {shown!r:.200}; allowed: localhost, 127.0.0.1, [::1]"
                message += "".join(f", {host}" for host in sorted(self._hosts)) + "; --allowed-host adds a name"
                return APIError(403, message, code="host_not_allowed")
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            origin = headers.get("origin", "")
            if "*" not in self._origins and origin not in self._origins:
                message = f"pages of {origin!r:.200} may not ask this server; --cors-origin allows an origin"
                return APIError(403, message, code="origin_not_allowed")
        return None

    async def _with_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["path"] == "/health" or self._shows_key(scope):
            await self._app(scope, receive, send)
        else:
            error = APIError(401, "the API key is missing or wrong", code="invalid_api_key")
            await error.response()(scope, receive, send)

    def _shows_key(self, scope: Scope) -> bool:
        assert self._key is not None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, shown = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), self._key)


def read_hosts(given: Collection[str], bound: socket.socket, key: bytes | None) -> frozenset[str] | None:
    """Reads `--allowed-host`, for the argument `hosts` of AuthMiddleware.

    Raises:
        FinetuneError: a value is not a host name.
    """
    names = set()
    for text in given:
        name = "*" if text == "*" else host_name(text)
        if name is None:
            raise FinetuneError(
                f"{text!r} is not a host name",
                where="--allowed-host",
                allowed="a name such as models.example.org, without http:// and without a path; * for any",
                fix="give the name that clients write between http:// and the next slash",
            )
        names.add(name)
    if "*" in names or (not names and (key is not None or not is_local(bound))):
        return None
    return frozenset(names)


def read_origins(given: Collection[str]) -> tuple[str, ...]:
    """Reads `--cors-origin`, for the argument `origins` of AuthMiddleware.

    Raises:
        FinetuneError: a value is not an origin.
    """
    for text in given:
        if _ORIGIN.fullmatch(text) is None:
            raise FinetuneError(
                f"{text!r} is not an origin",
                where="--cors-origin",
                allowed="https://app.example.org, http://localhost:3000 and the like, without a path; * for any",
                fix="give scheme, host and port as the browser's address line shows them",
            )
    return tuple(text.lower() for text in given)


def _endpoint(path: str) -> str:
    """The path as a metrics label with few values, whatever clients request."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ENDPOINTS else "other"
