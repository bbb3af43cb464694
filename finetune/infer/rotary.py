"""Rotary tables by position, for every rope type, as transformers turns tokens in `generate`.

Most types turn a token by its position alone. `longrope` (arXiv 2402.13753) has two sets of factors and chooses by the
longest position of a forward pass: the short ones up to the original length, the long ones for all of a pass that goes
beyond it. So in `generate` the tokens of a prompt are turned by the prompt's length, and each later one by its own
position. Here many prompts share a pass and a row may be computed anew with what it has said, so the tables say it
token by token, and a hook on the model's own rotary module gives them to a prompt's pass.

Shape suffixes: L positions, T tokens, N prompts, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class RotaryTables:
    """The tables of one model.

    Args:
        decoder: `MixtralModel` and its like.
        positions: how long they are.

    Attributes:
        cos_LD, sin_LD: for tokens that are generated, in the model's dtype, both halves alike.
    """

    def __init__(self, decoder: Any, positions: int):
        self._rotary = decoder.rotary_emb
        weight = decoder.embed_tokens.weight

        def tables(count: int) -> tuple[Tensor, Tensor]:
            """As a forward pass over so many tokens makes them."""
            cos, sin = self._rotary(weight.new_zeros(1), torch.arange(count, device=weight.device)[None])
            return cos[0].contiguous(), sin[0].contiguous()

        self.cos_LD, self.sin_LD = tables(positions)
        self._original: int | None = None
        if self._rotary.rope_type == "longrope":
            original = int(decoder.config.rope_parameters["original_max_position_embeddings"])
            if positions > original:
                self._original, self._long = original, (self.cos_LD, self.sin_LD)
                short = tables(original)
                self.cos_LD, self.sin_LD = (
                    torch.cat([of_short, of_long[original:]])
                    for of_short, of_long in zip(short, self._long, strict=True)
                )

    @contextlib.contextmanager
    def turning(self, position_T: Tensor, lengths: Sequence[int], began: Sequence[int]) -> Iterator[None]:
        """Inside, a forward pass over N rows side by side turns each token as `generate` would have.

        Args:
            position_T: where each token stands in its row.
            lengths: tokens of each row in the pass.
            began: of these, the row's prompt; the others were generated after it.
        """
        if self._original is None:
            yield
            return
        long_N = torch.tensor([prompt > self._original for prompt in began])
        long_T1 = long_N.repeat_interleave(torch.tensor(lengths)).to(position_T.device)[:, None]
        turned = [
            torch.where(long_T1, of_long[position_T], table[position_T])[None]
            for of_long, table in zip(self._long, (self.cos_LD, self.sin_LD), strict=True)
        ]
        hook = self._rotary.register_forward_hook(lambda module, arguments, made: tuple(turned))
        try:
            yield
        finally:
            hook.remove()
