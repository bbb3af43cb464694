"""The `choices` of answers to /v1/chat/completions and /v1/completions, whole and in pieces.

https://platform.openai.com/docs/api-reference/chat
https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from finetune.infer import TokenEvent
from finetune.serve.token_texts import TextOffset, TokenTexts, finite


class ChatChoices:
    """Builds the choices of /v1/chat/completions. `tokens` are those whose log-probabilities were asked for."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts):
        self._texts = texts

    def opening(self, number: int) -> dict[str, Any] | None:
        """The chunk before the first token."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, number: int, text: str, tokens: Sequence[TokenEvent], reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return {"index": number, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def whole(self, number: int, text: str, tokens: Sequence[TokenEvent], reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not tokens:
            return None
        content = [
            {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*other) for other in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = list(self._texts.spelled(token))
        return {"token": self._texts.shown(token), "logprob": finite(logprob), "bytes": spelled}


class CompletionChoices:
    """The same of /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    piece_object = "text_completion"

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._offsets: defaultdict[int, TextOffset] = defaultdict(TextOffset)

    def opening(self, number: int) -> dict[str, Any] | None:
        """There is no chunk before the first token."""
        return None

    def piece(self, number: int, text: str, tokens: Sequence[TokenEvent], reason: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": self._logprobs(number, tokens), "finish_reason": reason}

    whole = piece

    def _logprobs(self, number: int, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not tokens:
            return None
        offset = self._offsets[number]
        top = []
        for event in tokens:
            # Texts are the keys, so of two tokens that look the same the likelier one is reported.
            likely = {self._texts.shown(token): finite(logprob) for token, logprob in reversed(event.top)}
            top.append({**dict(reversed(likely.items())), self._texts.shown(event.token): finite(event.logprob)})
        return {
            "tokens": [self._texts.shown(event.token) for event in tokens],
            "token_logprobs": [finite(event.logprob) for event in tokens],
            "top_logprobs": top,
            "text_offset": [offset.before(self._texts.spelled(event.token)) for event in tokens],
        }
