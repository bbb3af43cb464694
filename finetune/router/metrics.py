"""Router health as pure formulas over sums.

Why: the auxiliary loss of transformers pools all layers before it takes the product, so eight layers that each
collapsed on a different pair of experts read as perfectly balanced; and a mean of per-batch ratios is biased upwards
for few tokens. Here integer counts and sums over tokens are added first (`RouterSums`), ratios come last, and a layer
is never mixed with another.

How: capture hands over one `RouterSums` per logging window; every formula below returns one number per layer. Nothing
here knows a model, a device or a trainer.

Shape suffixes: L layers, E experts. f is the load: the share of all assignments that went to an expert, summing to 1
over experts whatever `top_k` is. P is the mean router probability over the same tokens.

Leaves out: comparing two models on the same tokens (drift.py), what the numbers are called in a log (names.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# An expert that gets less than a tenth of an even share is called dead.
DEAD_UTILIZATION = 0.1
# One number a layer each, in the order of tables.
LAYER_METRICS = (
    "max_vio",
    "min_utilization",
    "max_utilization",
    "load_cv",
    "load_entropy",
    "token_entropy",
    "top1_prob",
    "z_loss",
    "balance_loss",
    "dead_experts",
    "repeat_first",
    "repeat_any",
)


@dataclass(frozen=True)
class RouterSums:
    """What a window of tokens did at every router. Plain CPU tensors, added up over micro-batches and processes.

    Attributes:
        counts: int64 [L, E], assignments per expert; each real token makes `top_k` of them in every layer.
        prob_sum: float64 [L, E], sum over tokens of the softmax of the router logits over all experts.
        tokens: number of real tokens.
        top_k: experts per token.
        z_sum: float64 [L], sum over tokens of logsumexp(logits)^2.
        entropy_sum: float64 [L], sum over tokens of the entropy of the router's probabilities, nats.
        top1_sum: float64 [L], sum over tokens of the largest probability.
        pairs: number of neighbouring real tokens of one document.
        same_first: int64 [L], those of the pairs whose first experts are the same.
        shared_any: int64 [L], those of the pairs that have at least one of their k experts in common.
    """

    counts: Tensor
    prob_sum: Tensor
    tokens: int
    top_k: int
    z_sum: Tensor
    entropy_sum: Tensor
    top1_sum: Tensor
    pairs: int
    same_first: Tensor
    shared_any: Tensor

    def __post_init__(self) -> None:
        assert self.counts.dim() == 2, self.counts.shape
        assert self.counts.shape == self.prob_sum.shape, (self.counts.shape, self.prob_sum.shape)
        for integers in (self.counts, self.same_first, self.shared_any):
            assert integers.dtype == torch.int64, integers.dtype
        for sums in (self.prob_sum, self.z_sum, self.entropy_sum, self.top1_sum):
            assert sums.dtype == torch.float64, sums.dtype
        for per_layer in (self.z_sum, self.entropy_sum, self.top1_sum, self.same_first, self.shared_any):
            assert per_layer.shape == self.counts.shape[:1], (per_layer.shape, self.counts.shape)
        assert bool((self.counts.sum(1) == self.tokens * self.top_k).all()), "a layer missed tokens or saw some twice"

    def __add__(self, other: RouterSums) -> RouterSums:
        assert self.top_k == other.top_k, (self.top_k, other.top_k)
        return RouterSums(
            counts=self.counts + other.counts,
            prob_sum=self.prob_sum + other.prob_sum,
            tokens=self.tokens + other.tokens,
            top_k=self.top_k,
            z_sum=self.z_sum + other.z_sum,
            entropy_sum=self.entropy_sum + other.entropy_sum,
            top1_sum=self.top1_sum + other.top1_sum,
            pairs=self.pairs + other.pairs,
            same_first=self.same_first + other.same_first,
            shared_any=self.shared_any + other.shared_any,
        )

    @property
    def layers(self) -> int:
        return self.counts.shape[0]

    @property
    def experts(self) -> int:
        return self.counts.shape[1]

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


def load_cv(load_LE: Tensor) -> Tensor:
    """Coefficient of variation of the load over experts: standard deviation (of all E, not E - 1) over mean."""
    return load_LE.std(dim=1, correction=0) * load_LE.shape[1]


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
    """Router health of one layer over one window.

    Attributes:
        load: f, one share an expert.
        token_entropy: mean entropy of a token's router probabilities, nats; ln E when the router is undecided.
        top1_prob: mean probability of a token's first expert.
        z_loss: mean of logsumexp(logits)^2, Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, equation 5.
        repeat_first: share of neighbouring tokens with the same first expert; Jiang et al. 2024 (Mixtral), arXiv
            2401.04088, table 5, "first choice". nan without neighbours.
        repeat_any: share of neighbouring tokens with an expert in common, "first or second choice" there for k = 2.
        The others: the functions of the same names.
    """

    load: tuple[float, ...]
    max_vio: float
    min_utilization: float
    max_utilization: float
    load_cv: float
    load_entropy: float
    token_entropy: float
    top1_prob: float
    z_loss: float
    balance_loss: float
    dead_experts: int
    repeat_first: float
    repeat_any: float


def layer_metrics(sums: RouterSums) -> list[LayerMetrics]:
    """Every metric of every layer. Needs at least one token."""
    load_LE, mean_prob_LE = sums.load, sums.mean_prob
    pairs = sums.pairs or math.nan
    columns = {
        "max_vio": max_vio(load_LE),
        "min_utilization": min_utilization(load_LE),
        "max_utilization": max_utilization(load_LE),
        "load_cv": load_cv(load_LE),
        "load_entropy": load_entropy(load_LE),
        "token_entropy": sums.entropy_sum / sums.tokens,
        "top1_prob": sums.top1_sum / sums.tokens,
        "z_loss": sums.z_sum / sums.tokens,
        "balance_loss": balance_loss(load_LE, mean_prob_LE),
        "dead_experts": dead_experts(load_LE),
        "repeat_first": sums.same_first.double() / pairs,
        "repeat_any": sums.shared_any.double() / pairs,
    }
    by_layer = zip(*(columns[name].tolist() for name in LAYER_METRICS), strict=True)
    return [
        LayerMetrics(tuple(load), **dict(zip(LAYER_METRICS, numbers, strict=True)))
        for load, numbers in zip(load_LE.tolist(), by_layer, strict=True)
    ]


def random_repetition(experts: int, top_k: int) -> tuple[float, float]:
    """`repeat_first` and `repeat_any` of uniform, independent routing: 1 / E and 1 - C(E - k, k) / C(E, k).

    12.5% and 46.4% for 2 of 8, as in table 5 of the Mixtral paper (arXiv 2401.04088).
    """
    return 1 / experts, 1 - math.comb(experts - top_k, top_k) / math.comb(experts, top_k)


def noise_floor(tokens: int, experts: int, top_k: int) -> float:
    """Expected MaxVio of so many tokens routed uniformly and independently: what chance alone shows.

    f_i E has variance (E/k - 1) / tokens, its deviations are correlated by -1 / (E - 1), and the largest of E
    independent standard normal numbers is expected at `_expected_maximum(E)`; at 2 of 8 this is 2.64 / sqrt(tokens).
    Simulated values lie within 5% of it from 64 tokens on.
    """
    if top_k == experts or tokens == 0:
        return 0.0
    deviation = math.sqrt((experts / top_k - 1) / tokens)
    return _expected_maximum(experts) * deviation * math.sqrt(experts / (experts - 1))


@cache
def _expected_maximum(count: int) -> float:
    """Expected largest of `count` independent standard normal numbers: the integral of x d(Phi(x)^count)."""
    x = torch.linspace(-9, 9, 18_001, dtype=torch.float64)
    return float(-torch.trapezoid(torch.special.ndtr(x) ** count - (x > 0).double(), x))
