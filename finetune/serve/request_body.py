"""The body of a request, checked: those of OpenAI's fields that are supported, and a few of our own.

`fields.py` lists all other fields and what happens to them.
"""

from __future__ import annotations

import codecs
import secrets
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from finetune.errors import DataError
from finetune.infer import Sampling
from finetune.serve.api_error import APIError
from finetune.serve.fields import (
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    HARMLESS,
    STREAM_OPTIONS_HARMLESS,
    STREAM_OPTIONS_REFUSED,
    Neutral,
    refuse_extras,
)

MAX_MESSAGES = 2048  # as OpenAI's
MAX_CHOICES = 128
MAX_STOPS = 16
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
SEEDS = 2**63
# Odd, so that the seeds of up to 2^63 choices differ; the golden ratio spreads them.
SEED_STEP = 0x9E3779B97F4A7C15


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, Field(ge=-SEEDS, lt=SEEDS)]  # what a number of tokens could be


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """The fields of both endpoints; null means the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="allow")
    refused: ClassVar[Neutral]

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Whole | None = None
    stop: Annotated[Annotated[list[str], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_one_as_list)] = None
    # Our own, named as in other servers.
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    def max_new_tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as fit."""
        return self.max_tokens

    def logprobs_count(self) -> int | None:
        """How many alternatives to report for each token (`Sampling.logprobs`); None for no log-probabilities."""
        raise NotImplementedError

    def field_name(self, name: str) -> str:
        """The request's name for a field of Sampling."""
        return "max_tokens" if name == "max_new_tokens" else name

    def samplings(self) -> list[Sampling]:
        """The sampling of each of the `n` answers; the first uses the request's seed.

        Raises:
            APIError: a value outside its range.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        length = self.max_new_tokens()
        try:
            return [
                Sampling(
                    max_new_tokens=SEEDS if length is None else length,
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_p=1.0 if self.top_p is None else self.top_p,
                    # Others write -1 for all.
                    top_k=0 if self.top_k in (None, -1) else self.top_k,
                    min_p=self.min_p or 0.0,
                    repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                    seed=(seed + choice * SEED_STEP) % SEEDS,
                    stop=tuple(self.stop or ()),
                    logprobs=self.logprobs_count(),
                    ignore_eos=bool(self.ignore_eos),
                )
                for choice in range(self.n or 1)
            ]
        except DataError as error:
            name = str(error.where)
            called = self.field_name(name)
            renamed = DataError(error.what.replace(name, called), allowed=error.allowed)
            raise APIError.of(renamed, called) from None


class ChatCompletionRequest(GenerationRequest):
    refused = CHAT_REFUSED

    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def tools_shown(self) -> Any:
        """Tools that the model may read of; `read_request` has refused those that it should call."""
        return (self.model_extra or {}).get("tools")

    def continues(self) -> bool:
        """Whether the last message is the assistant's, so that the answer continues it.

        Raises:
            APIError: the request says otherwise.
        """
        last = self.messages[-1]
        by_assistant = isinstance(last, dict) and last.get("role") == "assistant"
        for name, value in (
            ("continue_final_message", self.continue_final_message),
            ("add_generation_prompt", None if self.add_generation_prompt is None else not self.add_generation_prompt),
        ):
            if by_assistant and value is False:
                message = f"the last message is the assistant's, so the answer continues it; {name} says otherwise"
                raise APIError(400, f"{message}: leave it out, or end with a user's message", param=name)
            if not by_assistant and value is True:
                message = f"{name} asks for an answer that continues the last message, which is not the assistant's"
                raise APIError(400, f"{message}: leave it out, or end with a message of the assistant", param=name)
        return by_assistant

    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprobs_count(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def field_name(self, name: str) -> str:
        if name == "max_new_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "top_logprobs" if name == "logprobs" else super().field_name(name)


class CompletionRequest(GenerationRequest):
    refused = COMPLETION_REFUSED

    prompt: Any
    logprobs: Whole | None = None

    def max_new_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def logprobs_count(self) -> int | None:
        return self.logprobs


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def read_request(body: bytes, kind: type[RequestT], *, containers: int) -> RequestT:
    """Reads and checks a body.

    Args:
        containers: how many lists and objects it may have; two million take two seconds to read and hold up everybody.

    Raises:
        APIError: too many of them, not JSON, or a field that is unknown, unsupported, of the wrong type or out of
            range.
    """
    if body.count(b"[") + body.count(b"{") > containers:
        raise APIError(400, f"the body has too many lists and objects; allowed: {containers}")
    try:
        parsed = kind.model_validate(_read_json(body))
    except ValidationError as error:
        [fault, *_] = error.errors(include_url=False, include_input=False)
        param = ".".join(str(part)[:100] for part in fault["loc"]) or None
        if fault["type"] == "missing":
            raise APIError(400, f"{param} is missing", param=param) from None
        said = fault["msg"][0].lower() + fault["msg"][1:]
        raise APIError(400, f"{param or 'the body'}: {said}", param=param) from None
    refuse_extras(parsed.model_extra or {}, kind.refused, HARMLESS, kind.model_fields)
    options = parsed.stream_options
    if options is not None:
        known = (STREAM_OPTIONS_REFUSED, STREAM_OPTIONS_HARMLESS, StreamOptions.model_fields)
        refuse_extras(options.model_extra or {}, *known, where="stream_options.")
        if not parsed.stream:
            raise APIError(400, "stream_options needs stream=true", param="stream_options")
    return parsed


def _read_json(body: bytes) -> dict[str, Any]:
    """Parses the body as a JSON object.

    Raises:
        APIError: not UTF-8 (a byte order mark is accepted), or not a JSON object.
    """
    for mark, name, fix in (
        (b"\x1f\x8b", "gzip", "send it uncompressed"),
        (codecs.BOM_UTF16_LE, "UTF-16", "send it as UTF-8"),
        (codecs.BOM_UTF16_BE, "UTF-16", "send it as UTF-8"),
    ):
        if body.startswith(mark):
            raise APIError(400, f"the body is {name}; allowed: JSON in UTF-8; {fix}")
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        said = str(error)
        try:
            body.decode()
        except UnicodeDecodeError:
            said = "not UTF-8"
        raise APIError(400, f"the body: invalid JSON: {said}") from None
    if not isinstance(document, dict):
        raise APIError(400, "the body is not an object with fields")
    return document
