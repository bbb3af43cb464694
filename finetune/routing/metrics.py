"""Router health as pure formulas over counts.

Why: the auxiliary loss of transformers pools all layers before it takes the product, so eight layers that each
collapsed on a different pair of experts read as perfectly balanced; and a mean of per-batch ratios is biased upwards
for few tokens. Here integer counts and probability sums are added first (`RouterSums`), ratios come last, and a layer
is never mixed with another.

How: capture hands over one `RouterSums` per logging window; every formula below takes `load` (and `mean_prob`), both
[L, E], and returns one number per layer. Nothing here knows a model, a device or a trainer.

Shape suffixes: L layers, E experts. f is the load: the share of all assignments that went to an expert, summing to 1
over experts whatever `top_k` is. P is the mean router probability over the same tokens.

Leaves out: what needs more than counts per window (z-loss, repetition of consecutive tokens, drift from a base).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# An expert that gets less than a tenth of an even share is called dead.
DEAD_UTILIZATION = 0.1


@dataclass(frozen=True)
class RouterSums:
    """What a window of tokens did at every router. Plain CPU tensors, added up over micro-batches and processes.

    Attributes:
        counts: int64 [L, E], assignments per expert; each real token makes `top_k` of them in every layer.
        prob_sum: float64 [L, E], sum over tokens of the softmax of the router logits over all experts.
        tokens: number of real tokens.
        top_k: experts per token.
    """

    counts: Tensor
    prob_sum: Tensor
    tokens: int
    top_k: int

    def __post_init__(self) -> None:
        assert self.counts.dtype == torch.int64, self.counts.dtype
        assert self.prob_sum.dtype == torch.float64, self.prob_sum.dtype
        assert self.counts.dim() == 2, self.counts.shape
        assert self.counts.shape == self.prob_sum.shape, (self.counts.shape, self.prob_sum.shape)
        assert bool((self.counts.sum(1) == self.tokens * self.top_k).all()), "a layer missed tokens or saw some twice"

    def __add__(self, other: RouterSums) -> RouterSums:
        assert self.top_k == other.top_k, (self.top_k, other.top_k)
        return RouterSums(
            counts=self.counts + other.counts,
            prob_sum=self.prob_sum + other.prob_sum,
            tokens=self.tokens + other.tokens,
            top_k=self.top_k,
        )

    @property
    def load(self) -> Tensor:
        """f [L, E]: share of assignments per expert. Needs at least one token."""
        assert self.tokens > 0, "no token was routed in this window"
        return self.counts.double() / (self.tokens * self.top_k)

    @property
    def mean_prob(self) -> Tensor:
        """P [L, E]: mean router probability per expert. Needs at least one token."""
        assert self.tokens > 0, "no token was routed in this window"
        return self.prob_sum / self.tokens


def max_vio(load_LE: Tensor) -> Tensor:
    """MaxVio per layer, (max_i load_i - mean load) / mean load = max_i f_i * E - 1.

    0 when even, E/k - 1 when every token takes the same k experts. Wang et al. 2024, arXiv 2408.15664, section 4.1.
    """
    return load_LE.max(dim=1).values * load_LE.shape[1] - 1


def max_utilization(load_LE: Tensor) -> Tensor:
    """Load of the busiest expert in units of an even share, max_i f_i * E."""
    return load_LE.max(dim=1).values * load_LE.shape[1]


def min_utilization(load_LE: Tensor) -> Tensor:
    """Load of the idlest expert in units of an even share, min_i f_i * E."""
    return load_LE.min(dim=1).values * load_LE.shape[1]


def load_entropy(load_LE: Tensor) -> Tensor:
    """Entropy of the load over ln E: 1 when even, ln k / ln E when collapsed on k experts. 0 ln 0 is 0."""
    return torch.special.entr(load_LE).sum(dim=1) / math.log(load_LE.shape[1])


def balance_loss(load_LE: Tensor, mean_prob_LE: Tensor) -> Tensor:
    """Load-balancing loss per layer, E * sum_i f_i * P_i, without its coefficient.

    Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) equations 4 to 6, where a token counts once: 5 is f, 6 is
    P. For top-k routing f is a share of all k assignments, so the loss is 1 when even and E/k when collapsed on k
    experts; transformers' `load_balancing_loss_func` of one layer is k times this.
    """
    return load_LE.shape[1] * (load_LE * mean_prob_LE).sum(dim=1)


def dead_experts(load_LE: Tensor) -> Tensor:
    """Number of experts per layer below `DEAD_UTILIZATION` of an even share."""
    return (load_LE * load_LE.shape[1] < DEAD_UTILIZATION).sum(dim=1)


@dataclass(frozen=True)
class LayerMetrics:
    """Router health of one layer over one window."""

    load: tuple[float, ...]
    max_vio: float
    min_utilization: float
    max_utilization: float
    load_entropy: float
    balance_loss: float
    dead_experts: int


def layer_metrics(sums: RouterSums) -> list[LayerMetrics]:
    """Every metric of every layer. Needs at least one token."""
    load_LE, mean_prob_LE = sums.load, sums.mean_prob
    columns = zip(
        load_LE.tolist(),
        max_vio(load_LE).tolist(),
        min_utilization(load_LE).tolist(),
        max_utilization(load_LE).tolist(),
        load_entropy(load_LE).tolist(),
        balance_loss(load_LE, mean_prob_LE).tolist(),
        dead_experts(load_LE).tolist(),
        strict=True,
    )
    return [LayerMetrics(tuple(load), *numbers) for load, *numbers in columns]


def summary(layers: Sequence[LayerMetrics], *, tokens: int) -> dict[str, float]:
    """The few scalars to look at first, over all layers: means, and the worst layer where a mean would hide it."""
    count = len(layers)
    return {
        "router/max_vio_mean": sum(layer.max_vio for layer in layers) / count,
        "router/max_vio_worst": max(layer.max_vio for layer in layers),
        "router/min_utilization_worst": min(layer.min_utilization for layer in layers),
        "router/load_entropy_mean": sum(layer.load_entropy for layer in layers) / count,
        "router/load_entropy_worst": min(layer.load_entropy for layer in layers),
        "router/balance_loss_mean": sum(layer.balance_loss for layer in layers) / count,
        "router/balance_loss_worst": max(layer.balance_loss for layer in layers),
        "router/dead_experts": sum(layer.dead_experts for layer in layers),
        "router/tokens": tokens,
    }


def layer_scalars(layers: Sequence[LayerMetrics]) -> dict[str, float]:
    """Per-layer scalars by their logged names, `router/layer_07/max_vio`."""
    scalars: dict[str, float] = {}
    for index, layer in enumerate(layers):
        name = f"router/layer_{index:02d}"
        scalars[f"{name}/max_vio"] = layer.max_vio
        scalars[f"{name}/min_utilization"] = layer.min_utilization
        scalars[f"{name}/max_utilization"] = layer.max_utilization
        scalars[f"{name}/load_entropy"] = layer.load_entropy
        scalars[f"{name}/balance_loss"] = layer.balance_loss
    return scalars


def layer_loads(layers: Sequence[LayerMetrics]) -> dict[str, list[float]]:
    """Per-layer load vectors, `router/layer_07/load`, rounded to a millionth: for JSON, not for scalar loggers."""
    return {f"router/layer_{index:02d}/load": [round(f, 6) for f in layer.load] for index, layer in enumerate(layers)}
