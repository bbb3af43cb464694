"""What the device itself can do, measured in the run that it is compared with.

    roofline tokens/s = T / (T * F / G + 2 * W * (0.5159 + 2) / C)

T tokens of a micro-batch, F model FLOPs a token (below), G the dense GEMM rate at the shape of the experts' gate_up
product with the run's rows per expert, W the weights of all experts, C the copy rate (bytes read plus bytes written).
The second term is two passes, forward and backward, in which every expert weight is read in NF4 and written in 16 bits
once. Nothing overlaps and nothing else costs time, so a stack that fuses dequantization into the products may pass it.

Model FLOPs are what the arithmetic asks for, once: two operations for each weight that a token passes through, forward,
and the same again for the gradient of the input (dX). The frozen experts need no gradient of their own; where
attention and head train in full, their weight gradients (dW) are two operations more a weight. For Mixtral 8x7B with
LoRA that is 25.5 + 25.5 GFLOP a token. Left out, so that a share of the roofline errs on the low side: whatever a stack
recomputes, attention scores (1% of Mixtral's work at 1024 tokens, 4% at 4096), LoRA's own products (0.2% at r 16),
norms and the embedding's lookup.

Rates are medians after about a second of the same work, so that the clocks are those of sustained load.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetune.kernels import PackedExperts, dequantize_experts
from finetune.moe import GATE_UP_PROJ, NF4_BYTES_PER_WEIGHT, MoeArch

COPY_BYTES = 2 * 2**30  # of each buffer: far beyond any cache
_REPETITIONS = 20


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device: bytes and FLOPs a second."""

    copy: float
    gemm: float
    gemm_shape: tuple[int, int, int]
    dequantize: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_rates(arch: MoeArch, tokens: int, stack: PackedExperts, dtype: torch.dtype) -> Rates:
    """Rates on the stack's GPU, for a micro-batch of `tokens`.

    Args:
        stack: the gate_up matrices of a layer.
    """
    device = stack.packed.device
    out, in_ = arch.expert_shapes()[GATE_UP_PROJ]
    rows = max(1, tokens * arch.top_k // arch.experts)
    x = torch.randn(rows, in_, dtype=dtype, device=device)
    weight = torch.randn(out, in_, dtype=dtype, device=device)
    gemm = 2 * rows * in_ * out / sustained_seconds(lambda: torch.mm(x, weight.T))
    weights = arch.experts * out * in_
    moved = stack.nbytes + weights * dtype.itemsize
    dequantize = moved / sustained_seconds(lambda: dequantize_experts(stack, dtype))
    return Rates(copy_rate(device), gemm, (rows, in_, out), dequantize)


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written a second, between two large buffers."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / sustained_seconds(lambda: target.copy_(source))


def sustained_seconds(work: Callable[[], object], *, warm_up: float = 1.0) -> float:
    """Median seconds of one call on the GPU, after `warm_up` seconds of calls."""
    until = time.perf_counter() + warm_up
    while time.perf_counter() < until:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(_REPETITIONS + 1)]
    ends[0].record()
    for end in ends[1:]:
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(ends)) / 1000


def roofline_tokens_per_second(
    arch: MoeArch, tokens: int, *, flops_per_token: int, gemm_rate: float, copy_rate: float
) -> float:
    """The formula above."""
    passes = 2 * arch.expert_params * (NF4_BYTES_PER_WEIGHT + 2)
    return tokens / (tokens * flops_per_token / gemm_rate + passes / copy_rate)


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
