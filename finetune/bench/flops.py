"""Model FLOPs of a training step, counted from the shape alone.

Counted is what the arithmetic asks for, once: two operations for each weight that a token passes through, forward, and
the same again for the gradient of the input (dX). The frozen experts need no gradient of their own; where attention,
embeddings and head train in full, their weight gradients (dW) are two operations more a weight. For Mixtral 8x7B with
LoRA that is 25.5 + 25.5 GFLOP a token.

Left out, so that a share of a roofline errs on the low side: whatever a stack recomputes, the attention scores (1% of
Mixtral's work at 1024 tokens, 4% at 4096), LoRA's own products (0.2% at r 16), norms and the embedding's lookup.
"""

from __future__ import annotations

from finetune.moe import MoeArch


def forward_flops(arch: MoeArch) -> int:
    """FLOPs a token of the matrix products of one forward pass; attention scores are not counted."""
    return 2 * (arch.attention_params + arch.router_params + _active_expert_params(arch) + _head_params(arch))


def training_flops(arch: MoeArch, *, full_weights: bool = False) -> int:
    """FLOPs a token of forward and backward.

    Args:
        full_weights: attention and head train in full (`trainable.method: non_moe`), and not through an adapter.
    """
    weight_gradients = 2 * (arch.attention_params + _head_params(arch)) if full_weights else 0
    return 2 * forward_flops(arch) + weight_gradients


def _active_expert_params(arch: MoeArch) -> int:
    return arch.expert_params // arch.experts * arch.top_k


def _head_params(arch: MoeArch) -> int:
    return arch.vocab * arch.hidden
