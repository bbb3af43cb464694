"""A trace of routing with the locality that trained Mixtrals show, to replay on random weights.

Random weights route every token anew: with C of E experts in slots a cache finds C / E of them. Trained routers repeat
themselves: table 5 of Mixtral of Experts (arXiv 2401.04088) counts how often a token shares at least one of its two
experts with the token before, at layers 0, 15 and 31 of 8x7B. The trace draws each token so that this share is met at
these layers and lies between them on a line elsewhere; of the pairs with something in common as many are equal as
chance would make (1 of 13). All experts are equally popular: the table says nothing about that.

Shape suffixes: N steps, T rows, L layers, K = 2 choices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finetune.infer import DecodeStep, Layer
from finetune.kernels import Fp16Activations

# Shares of "first or second choice" repeated, the mean over the table's eight sources, at these layers of 32.
SHARED = {0: 0.480, 15: 0.637, 31: 0.509}
_EXPERTS, _CHOICES = 8, 2


def shared_share(layer: int, layers: int) -> float:
    """P(a token shares an expert with the token before) at a layer."""
    place = layer * 31 / max(1, layers - 1)
    for before, after in pairwise(SHARED):
        if place <= after:
            return SHARED[before] + (SHARED[after] - SHARED[before]) * (place - before) / (after - before)
    return SHARED[31]


def make_trace(steps: int, rows: int, layers: int, seed: int) -> Tensor:
    """int64 [N, T, L, K]: chosen experts of 8, rows independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    share_L = torch.tensor([shared_share(layer, layers) for layer in range(layers)])
    trace = torch.empty(steps, rows, layers, _CHOICES, dtype=torch.int64)
    trace[0] = torch.rand(rows, layers, _EXPERTS, generator=generator).argsort(-1)[..., :_CHOICES]
    for step in range(1, steps):
        # The token's experts among the two of the last one, then among the other six, each in random order.
        last = torch.zeros(rows, layers, _EXPERTS).scatter_(-1, trace[step - 1], 1.0)
        order = torch.rand(rows, layers, _EXPERTS, generator=generator)
        old = (order + 2 * last).argsort(-1, descending=True)[..., :_CHOICES]
        new = (order - 2 * last).argsort(-1, descending=True)[..., :_CHOICES]
        shares = torch.rand(rows, layers, generator=generator) < share_L
        both = shares & (torch.rand(rows, layers, generator=generator) < 1 / 13)
        first = torch.where(shares, old[..., 0], new[..., 0])
        second = torch.where(both, old[..., 1], torch.where(shares, new[..., 0], new[..., 1]))
        trace[step] = torch.stack([first, second], -1)
    return trace


class TracedStep(DecodeStep):
    """A decoding step that goes by a trace; the router computes as ever, for its time and its weights."""

    def follow(self, trace_NTLK: Tensor) -> None:
        """From now on, over and over. Must be called before the step is captured."""
        self._trace, self._step = trace_NTLK, torch.zeros(1, dtype=torch.int64, device=trace_NTLK.device)

    def _route(self, layer: Layer, number: int, rows: Fp16Activations, which_T: Tensor) -> tuple[Tensor, Tensor]:
        _, weight_TK = super()._route(layer, number, rows, which_T)
        if number == 0:
            self._step.add_(1).remainder_(self._trace.shape[0])
        index: Any = self._trace.index_select(0, self._step)[0, : len(rows.x), number]
        return index.contiguous(), weight_TK
