"""Errors over HTTP, in the form of OpenAI's API.

Types and codes are those that OpenAI's clients check; the messages are ours: what, allowed, fix.
"""

from __future__ import annotations

import json

from starlette.responses import Response

from finetune.errors import FinetuneError

RETRY_SECONDS = 2


class APIError(Exception):
    """An HTTP status with OpenAI's error body.

    Args:
        param: the faulty field of the request.
        code: a machine-readable name, such as `model_not_found`.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: FinetuneError, param: str | None) -> APIError:
        """An error of ours as status 400, its message on one line."""
        parts = [error.what]
        if error.allowed is not None:
            parts.append(f"allowed: {error.allowed}")
        if error.fix is not None:
            parts.append(error.fix)
        return cls(400, "; ".join(parts), param=param)

    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")

    def response(self) -> Response:
        """With the headers that say when to try again or how to authenticate."""
        headers = {401: {"www-authenticate": "Bearer"}, 415: {"accept-encoding": "identity"}}.get(self.status, {})
        if self.status in (429, 503):
            headers = {"retry-after": str(RETRY_SECONDS)}
        return Response(self.body(), self.status, headers, "application/json")
