"""The shape of answers to /v1/chat/completions, whole and in pieces.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.infer import TokenEvent
from finetune.serve.token_texts import TokenTexts, finite


class ChatForm:
    """Makes the `choices` of documents.

    Args:
        told: whether log-probabilities were asked for.
    """

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, told: bool):
        self._texts = texts
        self._told = told

    def opening(self, number: int) -> dict[str, Any] | None:
        """A piece before the first token."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, number: int, text: str, tokens: Sequence[TokenEvent], reason: str | None) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": text} if text or reason is None else {},
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }

    def whole(self, number: int, text: str, tokens: Sequence[TokenEvent], reason: str) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._told:
            return None
        content = [
            {
                **self._token(event.token, event.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in event.top],
            }
            for event in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._texts.shown(token),
            "logprob": finite(logprob),
            "bytes": list(self._texts.spelled(token)),
        }
