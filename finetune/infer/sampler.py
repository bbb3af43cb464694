"""Chooses the next tokens of a batch on the device, each row by its own settings.

Each row draws one random number per token from a generator with its own seed, so the rest of the batch has no
influence. Greedy batches take one kernel.

Shape suffixes: T rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.infer.request import Sampling

_LEAST = torch.finfo(torch.float32).tiny


class RowSampling:
    """One request's settings, its random numbers, and the tokens that a repetition penalty looks at."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self._random = np.random.Generator(np.random.Philox(sampling.seed))
        self._drawn: list[float] = []
        self._next = 0
        self._prompt = prompt
        self._seen_V: Tensor | None = None

    def draw(self) -> float:
        """Draws the random number of the next token, in [0, 1)."""
        if self._next == len(self._drawn):
            self._drawn.append(self._random.random())
        self._next += 1
        return self._drawn[self._next - 1]

    def go_to(self, tokens: int) -> None:
        """Rewinds to the draw after so many tokens, because a failed pass has drawn for nothing."""
        self._next = min(tokens, len(self._drawn))

    def seen(self, logits_TV: Tensor) -> Tensor | None:
        """bool [V] of the prompt's and the answer's tokens, made on first use by the thread that samples."""
        if self.sampling.repetition_penalty == 1:
            return None
        if self._seen_V is None:
            self._seen_V = torch.zeros(logits_TV.shape[1], dtype=torch.bool, device=logits_TV.device)
            self._seen_V[torch.tensor(self._prompt, device=logits_TV.device)] = True
        return self._seen_V


@dataclass(frozen=True)
class Chosen:
    """Next tokens int64 [T]; log-probabilities float32 [T] and the likeliest tokens [T, n] where any row asks.

    Attributes:
        finite_T: bool; of a row whose logits hold NaN or infinity the token is one of the vocabulary and means nothing.
    """

    token_T: Tensor
    finite_T: Tensor
    logprob_T: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def choose(logits_TV: Tensor, rows: Sequence[RowSampling]) -> Chosen:
    """The next token of each row; draws one random number for each row that samples.

    Args:
        logits_TV: float32.
    """
    settings = [row.sampling for row in rows]
    best = logits_TV.max(-1)  # NaN where there is one
    finite_T = best.values.isfinite()
    if all(setting.temperature == 0 and setting.repetition_penalty == 1 for setting in settings):
        token_T = best.indices
    else:
        token_T = _sample(torch.where(finite_T[:, None], logits_TV, 0.0), rows)
        for row, token in zip(rows, token_T, strict=True):
            seen_V = row.seen(logits_TV)
            if seen_V is not None:
                seen_V.index_fill_(0, token[None], True)
    asked = [setting.logprobs for setting in settings if setting.logprobs is not None]
    if not asked:
        return Chosen(token_T, finite_T)
    logprob_TV = logits_TV.log_softmax(-1)
    top = logprob_TV.topk(min(logits_TV.shape[1], max(1, *asked)), dim=-1)
    return Chosen(token_T, finite_T, logprob_TV.gather(1, token_T[:, None])[:, 0], top.indices, top.values)


def _sample(logits_TV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """The tokens, always of the vocabulary.

    Args:
        logits_TV: no NaN, and a finite one in each row.
    """
    device, settings = logits_TV.device, [row.sampling for row in rows]
    vocab = logits_TV.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)[:, None]

    masks = [row.seen(logits_TV) for row in rows]
    if any(mask is not None for mask in masks):
        nothing = torch.zeros(vocab, dtype=torch.bool, device=device)
        seen = torch.stack([nothing if mask is None else mask for mask in masks])
        penalty = column([setting.repetition_penalty for setting in settings])
        punished = torch.where(logits_TV > 0, logits_TV / penalty, logits_TV * penalty)
        logits_TV = torch.where(seen, punished, logits_TV)
    greedy = column([setting.temperature == 0 for setting in settings]).bool()
    # Below the best, so that a low temperature makes the others impossible and not the best infinite.
    temperature = column([max(setting.temperature, _LEAST) if setting.temperature else 1.0 for setting in settings])
    below = (logits_TV - logits_TV.amax(-1, keepdim=True)) / temperature
    values, order = below.sort(dim=-1, descending=True, stable=True)
    p = values.softmax(-1)
    rank = torch.arange(vocab, device=device)
    keep = rank < column([float(min(setting.top_k or vocab, vocab)) for setting in settings])
    p = p * keep
    p = p / p.sum(-1, keepdim=True)
    # A token belongs to the nucleus while those before it do not fill it.
    keep &= (p.cumsum(-1) - p) < column([setting.top_p for setting in settings])
    keep &= (p > 0) & (p >= p[:, :1] * column([setting.min_p for setting in settings]))
    keep[:, 0] = True
    # What is kept stands first; rounding in the sums may not put a token behind one that is not.
    kept = torch.where(keep, vocab, rank).amin(-1, keepdim=True)
    filled = (p * (rank < kept)).cumsum(-1)
    drawn = column([row.draw() if row.sampling.temperature else 0.0 for row in rows])
    # Of the sum, which rounding may leave short of one. A number just below one is one in 32 bits, beyond every token.
    at = torch.searchsorted(filled, drawn * filled[:, -1:], right=True)
    at = torch.minimum(at, kept - 1)
    return order.gather(1, torch.where(greedy, 0, at))[:, 0]
