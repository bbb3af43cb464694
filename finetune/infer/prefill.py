"""Runs prompts through the model's own forward, several packed into one row, and writes keys and values to pages.

The experts run through the training backends and attention as one packed sequence per prompt, exactly as in training;
a cache object stands where transformers expects one and writes what each layer makes to the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from finetune.infer.pages import PAGE, PagePool
from finetune.infer.rotary import RotaryTables


class _PageWriter(Cache):
    """Hands keys and values [1, G, T, D] on as they are, after writing them to their pages."""

    def __init__(self, pool: PagePool, slots_T: Tensor):
        super().__init__(layers=[])
        self.pool, self.slots_T = pool, slots_T

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.pool.write(layer_idx, self.slots_T, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
    pool: PagePool,
    rotary: RotaryTables,
    began: Sequence[int] | None = None,
) -> Tensor:
    """float32 logits [N, V] after the last token of each of N prompts.

    Args:
        model: the causal LM itself, with the adapter active that all prompts go by; its attention must take packed
            rows (`attention.VARLEN`).
        pages: each prompt's pages, in order.
        began: tokens of each prompt that were not generated after it, as those of a row that is computed anew were.
    """
    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    slots = torch.cat(
        [
            torch.tensor(own)[torch.arange(length) // PAGE] * PAGE + torch.arange(length) % PAGE
            for own, length in zip(pages, lengths, strict=True)
        ]
    )
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    ends = torch.tensor(lengths).cumsum(0)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32)
    position_T = positions.to(device)
    with rotary.turning(position_T, lengths, began or lengths):
        hidden = model.model(
            input_ids=ids.to(device)[None],
            position_ids=position_T[None],
            past_key_values=_PageWriter(pool, slots.to(device)),
            use_cache=True,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        ).last_hidden_state
    return model.lm_head(hidden[0, (ends - 1).to(device)]).float()
