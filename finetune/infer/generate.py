"""Streams an answer token by token, through transformers' own `generate` and the quantized experts.

Leaves out: batching, a static cache, serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from finetune.data.encoding import Refused, encoder_of
from finetune.errors import DataError
from finetune.model import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p applies above 0; the same seed gives the same answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Generated text without special tokens, and how many tokens went in and came out."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class _CallbackStreamer(TextStreamer):
    """Hands finished text to a function instead of printing it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompt: str,
    sampling: Sampling,
    *,
    raw: bool = False,
    write: Callable[[str], None] | None = None,
) -> Answer:
    """Answers one prompt.

    Args:
        prompt: a user's turn, put into the model's chat template.
        raw: continue the text as it stands instead (for base models).
        write: receives the text piece by piece while it is generated.

    Raises:
        DataError: an empty prompt, one longer than the model's positions, or no chat template.
    """
    ids = encode_prompt(loaded, prompt, raw=raw)
    room = loaded.model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens",
            where="--prompt",
            allowed=f"fewer than {loaded.model.config.max_position_embeddings}",
            fix="shorten the prompt",
        )
    set_seed(sampling.seed)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    input_ids = torch.tensor([ids], device=loaded.device)
    model: Any = loaded.model
    model.eval()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(sampling.max_new_tokens, room),
        pad_token_id=loaded.tokenizer.pad_token_id,
        eos_token_id=loaded.tokenizer.eos_token_id,
        streamer=None if write is None else _CallbackStreamer(loaded.tokenizer, write),
        **choice,
    )
    completion = output[0, len(ids) :].tolist()
    text = str(loaded.tokenizer.decode(completion, skip_special_tokens=True))
    return Answer(text.strip(), len(ids), len(completion))


def encode_prompt(loaded: LoadedModel, prompt: str, *, raw: bool) -> list[int]:
    """Token ids of the prompt, with the beginning-of-sequence token.

    A control token spelled out in the prompt is ordinary text, raw or not.

    Raises:
        DataError: an empty prompt, no chat template, or one that refuses the prompt.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty", where="--prompt", fix="give some text")
    tokenizer: Any = loaded.tokenizer
    if raw:
        return [tokenizer.bos_token_id, *encoder_of(tokenizer).encode_text(prompt)]
    if tokenizer.chat_template is None:
        raise DataError(
            "the model's tokenizer has no chat template",
            where=loaded.base.path,
            fix="use --raw to continue the text as it stands",
        )
    message = [{"role": "user", "content": prompt}]
    try:
        [encoded] = encoder_of(tokenizer).encode([message], add_generation_prompt=True)
    except Refused as refusal:
        raise refusal.error("--prompt") from None
    return [int(token) for token in encoded.ids]
