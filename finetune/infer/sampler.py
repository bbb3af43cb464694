"""Chooses the next tokens of a batch on the device, each row by its own settings.

A row's randomness is one number a token, from a generator of its own seed: what else is in the batch has no part in
it. Greedy batches take one kernel.

Shape suffixes: T rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.infer.request import Sampling


class RowSampling:
    """One request's settings, its random numbers, and the tokens that a repetition penalty looks at."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self.random = np.random.Generator(np.random.Philox(sampling.seed))
        self._prompt = prompt
        self._seen_V: Tensor | None = None

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
    """Next tokens int64 [T]; log-probabilities float32 [T] and the likeliest tokens [T, n] where any row asks."""

    token_T: Tensor
    logprob_T: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def choose(logits_TV: Tensor, rows: Sequence[RowSampling]) -> Chosen:
    """The next token of each row; draws one random number for each row that samples.

    Args:
        logits_TV: float32.
    """
    settings = [row.sampling for row in rows]
    if all(setting.temperature == 0 and setting.repetition_penalty == 1 for setting in settings):
        token_T = logits_TV.argmax(-1)
    else:
        token_T = _sample(logits_TV, rows)
        for row, token in zip(rows, token_T, strict=True):
            seen_V = row.seen(logits_TV)
            if seen_V is not None:
                seen_V.index_fill_(0, token[None], True)
    asked = [setting.logprobs for setting in settings if setting.logprobs is not None]
    if not asked:
        return Chosen(token_T)
    logprob_TV = logits_TV.log_softmax(-1)
    top = logprob_TV.topk(max(1, *asked), dim=-1)
    return Chosen(token_T, logprob_TV.gather(1, token_T[:, None])[:, 0], top.indices, top.values)


def _sample(logits_TV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    device, settings = logits_TV.device, [row.sampling for row in rows]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)[:, None]

    masks = [row.seen(logits_TV) for row in rows]
    if any(mask is not None for mask in masks):
        nothing = torch.zeros(logits_TV.shape[1], dtype=torch.bool, device=device)
        seen = torch.stack([nothing if mask is None else mask for mask in masks])
        penalty = column([setting.repetition_penalty for setting in settings])
        punished = torch.where(logits_TV > 0, logits_TV / penalty, logits_TV * penalty)
        logits_TV = torch.where(seen, punished, logits_TV)
    greedy = column([setting.temperature == 0 for setting in settings]).bool()
    temperature = column([setting.temperature or 1.0 for setting in settings])
    values, order = (logits_TV / temperature).sort(dim=-1, descending=True, stable=True)
    p = values.softmax(-1)
    vocab = p.shape[1]
    rank = torch.arange(vocab, device=device)
    keep = rank < column([float(setting.top_k or vocab) for setting in settings])
    p = p * keep
    p = p / p.sum(-1, keepdim=True)
    # A token belongs to the nucleus while those before it do not fill it: the first always does.
    keep = (p.cumsum(-1) - p) < column([setting.top_p for setting in settings])
    keep &= p >= p[:, :1] * column([setting.min_p for setting in settings])
    filled = (p * keep).cumsum(-1)
    drawn = column(
        [0.0 if setting.temperature == 0 else row.random.random() for row, setting in zip(rows, settings, strict=True)]
    )
    # Of the sum, which rounding may leave short of one; strictly below it, so that the last kept token is the last.
    at = torch.searchsorted(filled, drawn * filled[:, -1:], right=True)
    at = torch.minimum(at, keep.sum(-1, keepdim=True) - 1)
    return order.gather(1, torch.where(greedy, 0, at))[:, 0]
