"""Streams answers to prompts one at a time, for `finetune generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import DataError
from finetune.infer.engine import Engine
from finetune.infer.request import FinishedEvent, Request, Sampling
from finetune.infer.text import encode_messages, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """Generated text without special tokens, and how many tokens went in and came out."""

    text: str
    prompt_tokens: int
    completion_tokens: int


def generate(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    *,
    raw: bool = False,
    write: Callable[[str], None] | None = None,
) -> Answer:
    """Answers one prompt with the engine's first model.

    Args:
        prompt: a user's turn, put into the model's chat template.
        raw: whether to continue the text as it stands instead (for base models).
        write: receives the text piece by piece while it is generated.

    Raises:
        DataError: an empty prompt, one longer than the model's positions, or no chat template.
        EngineError: the answer could not be finished, for example because logits are NaN.
    """
    ids = encode_prompt(engine.tokenizer_of(None), prompt, raw=raw)
    if len(ids) >= engine.max_length:
        raise DataError(
            f"the prompt has {len(ids)} tokens",
            where="--prompt",
            allowed=f"fewer than {engine.max_length}",
            fix="shorten the prompt",
        )
    pieces: list[str] = []
    after = engine.prompt_end(ids) if raw else None
    for event in engine.stream(Request(tuple(ids), sampling, after=after)):
        pieces.append(event.text)
        if write is not None and event.text:
            write(event.text)
    assert isinstance(event, FinishedEvent), "the last event of a request"
    if event.error is not None:
        raise event.error
    return Answer("".join(pieces).strip(), event.prompt_tokens, event.completion_tokens)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> list[int]:
    """Token ids of the prompt, with the beginning-of-sequence token.

    A control token spelled out in the prompt is ordinary text, raw or not.

    Raises:
        DataError: an empty prompt, no chat template, or one that refuses the prompt.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty", where="--prompt", fix="give some text")
    if raw:
        return encode_text(tokenizer, prompt)
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}], where="--prompt")
