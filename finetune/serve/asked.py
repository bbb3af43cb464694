"""The body of a request, checked: OpenAI's fields that mean something here, ours beside them, and what is refused.

A field that would change the answer and cannot be honoured is refused unless its value asks for nothing; fields that
only accompany a request are ignored. An unknown field is ignored as well, except one that looks like a misspelt known
one: a `max_token` that does nothing would be found out late.
"""

from __future__ import annotations

import difflib
import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.errors import DataError
from finetune.infer.request import Sampling
from finetune.serve.refusal import Refusal

MAX_CHOICES = 128
MAX_STOPS = 16
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
SEEDS = 2**63
# Odd, so that the seeds of up to 2^63 choices differ; the golden ratio spreads them.
SEED_STEP = 0x9E3779B97F4A7C15

# What cannot be done here, and the values besides null that do not ask for it.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    # Extensions of other servers that clients send.
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
HARMLESS: tuple[str, ...] = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
HARMLESS += ("prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity", "prediction")


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Asked(BaseModel):
    """Fields of both endpoints; null is the same as silence."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: Annotated[Annotated[list[str], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_one_as_list)] = None
    # Ours, named as elsewhere.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    def length(self) -> int | None:
        """Tokens of the answer at most; None: as many as there is room for."""
        return self.max_tokens

    def told(self) -> int | None:
        """`Sampling.logprobs`."""
        raise NotImplementedError

    def called(self, name: str) -> str:
        """What a field of Sampling is called here."""
        return "max_tokens" if name == "max_new_tokens" else name

    def samplings(self) -> list[Sampling]:
        """How to choose tokens for each of `n` answers; the first has the request's seed.

        Raises:
            Refusal: a value outside its range.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        length = self.length()
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
                    logprobs=self.told(),
                    ignore_eos=bool(self.ignore_eos),
                )
                for choice in range(self.n or 1)
            ]
        except DataError as error:
            name = str(error.where)
            called = self.called(name)
            renamed = DataError(error.what.replace(name, called), allowed=error.allowed)
            raise Refusal.of(renamed, called) from None


class ChatAsked(Asked):
    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def told(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def called(self, name: str) -> str:
        if name == "max_new_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "top_logprobs" if name == "logprobs" else super().called(name)


class CompletionAsked(Asked):
    prompt: Any
    logprobs: int | None = None

    def length(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def told(self) -> int | None:
        return self.logprobs


AskedT = TypeVar("AskedT", bound=Asked)


def read_asked(body: bytes, kind: type[AskedT]) -> AskedT:
    """The body's fields.

    Raises:
        Refusal: not JSON, a field of the wrong type or outside its range, one that cannot be honoured or is misspelt.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        [fault, *_] = error.errors(include_url=False, include_input=False)
        param = ".".join(str(part) for part in fault["loc"]) or None
        if fault["type"] == "missing":
            raise Refusal(400, f"{param} is missing", param=param) from None
        said = fault["msg"][0].lower() + fault["msg"][1:]
        raise Refusal(400, f"{param or 'the body'}: {said}", param=param) from None
    _refuse_extras(asked.model_extra or {}, [*kind.model_fields, *REFUSED, *HARMLESS])
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options needs stream=true", param="stream_options")
    return asked


def _refuse_extras(extras: dict[str, Any], known: list[str]) -> None:
    for name, value in extras.items():
        if name in REFUSED:
            if value is not None and value not in REFUSED[name]:
                others = ", ".join(["leaving it out", *(repr(neutral) for neutral in REFUSED[name])])
                raise Refusal(400, f"{name} is not supported; allowed: {others}", param=name, code="unsupported_value")
        elif name not in known and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            raise Refusal(400, f"there is no {name}; did you mean {near[0]}?", param=name, code="unknown_parameter")
