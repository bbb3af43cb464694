"""Requests to the engine and its events: plain data without torch, so that a server can check requests early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.errors import DataError, FinetuneError

if TYPE_CHECKING:
    from finetune.infer.text import PromptEnd

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Temperature 0 is greedy, whatever the filters say. Above 0 the filters apply in this order: `repetition_penalty`
    (CTRL, arXiv 1909.05858, section 4.1; over prompt and answer), temperature, `top_k` (0: all), `top_p`, `min_p`
    (tokens of at least `min_p` times the best one's probability; arXiv 2407.01082). The likeliest token always stays,
    so a temperature or `top_p` however near 0 is greedy too. The same seed gives the same answer, whatever else is in
    the batch.

    Attributes:
        stop: texts that end an answer; they are not part of it.
        logprobs: how many of the most likely tokens to report for each token; 0 for only its own log-probability, None
            for none. They are of the model's distribution, before the filters.
        ignore_eos: continues after an end-of-sequence token, up to `max_new_tokens` (for benches).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises DataError on a value outside its range."""
        for name, good, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p < 1, "0 or more, below 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        ):
            if not good:
                raise DataError(
                    f"{name} is {getattr(self, name)!r}", where=name, allowed=allowed, fix=f"give {name} such a value"
                )


@dataclass(frozen=True)
class Request:
    """Token ids to continue, with the beginning-of-sequence token, and the model that continues them.

    Attributes:
        after: the prompt's end (`Engine.prompt_end`) if the answer continues the prompt's text, so that a leading space
            is shown; None for an answer that stands alone.
    """

    ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    model: str | None = None
    after: PromptEnd | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        text: text that can be shown now; "" while a character is incomplete or a stop text may have begun.
        logprob: the log-probability of this token, where requested.
        top: the most likely tokens, best first.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FinishedEvent:
    """The last event of a request.

    Attributes:
        text: text of the answer that had been held back.
        reason: stop (end of sequence, or a stop text), length (max_new_tokens, or no room left), cancelled, error.
        stop: the stop text that was met, if one was.
        error: why the answer could not be finished; earlier events stay valid.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    stop: str | None = None
    error: FinetuneError | None = None


Event = TokenEvent | FinishedEvent
