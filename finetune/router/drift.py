"""How far a tuned model's routing has moved from its base's, on the same tokens.

Why: fine-tuning moves the routing even where the router is frozen, because its input moves; loss and balance do not
show it. How: both models read the same text, teacher-forced, and every token's router distributions are compared,
layer by layer, in float64. Sums come first (`DriftSums`), ratios last, so rows can be read one at a time and added up.

Overlap is 1 for an untouched model and k / E for routing that forgot its base (`chance_overlap`). Kullback-Leibler and
Jensen-Shannon divergences are in nats; the latter, of loads, is at most ln 2 (Lin 1991, doi 10.1109/18.61115).

Leaves out: running models (study/probe.py), and padding: every row given counts.

Shape suffixes: L layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# A stack [L, N, E], or one [N, E] of each layer, on any device. log_softmax leaves log-probabilities as they are, so
# logits do as well.
PerLayer = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Drift:
    """How far the routing of each layer moved, over `tokens` tokens.

    Attributes:
        overlap: mean share of the k chosen experts that both chose, |A and B| / k.
        top1_agreement: share of tokens whose most probable expert is the same.
        kl: mean KL(base || tuned) of the router distributions, nats.
        js_load: Jensen-Shannon divergence of the two loads, nats.
        load_change: largest change of an expert's load in units of an even share, max_i |f_i - f_i of base| * E.
        tokens: how many were compared.
    """

    overlap: list[float]
    top1_agreement: list[float]
    kl: list[float]
    js_load: list[float]
    load_change: list[float]
    tokens: int


@dataclass(frozen=True)
class DriftSums:
    """What a `Drift` is made of, added up over tokens. CPU tensors.

    Attributes:
        shared: int64 [L], chosen experts that base and tuned have in common.
        same_first: int64 [L], tokens with the same first expert.
        kl_sum: float64 [L], sum over tokens of KL(base || tuned), nats.
        base_counts, tuned_counts: int64 [L, E], assignments per expert.
        tokens: number of tokens.
        top_k: experts per token.
    """

    shared: Tensor
    same_first: Tensor
    kl_sum: Tensor
    base_counts: Tensor
    tuned_counts: Tensor
    tokens: int
    top_k: int

    def __post_init__(self) -> None:
        for counts in (self.base_counts, self.tuned_counts):
            assert counts.dtype == torch.int64, counts.dtype
            assert bool((counts.sum(1) == self.tokens * self.top_k).all()), "a layer missed tokens"

    def __add__(self, other: DriftSums) -> DriftSums:
        assert self.top_k == other.top_k, (self.top_k, other.top_k)
        return DriftSums(
            shared=self.shared + other.shared,
            same_first=self.same_first + other.same_first,
            kl_sum=self.kl_sum + other.kl_sum,
            base_counts=self.base_counts + other.base_counts,
            tuned_counts=self.tuned_counts + other.tuned_counts,
            tokens=self.tokens + other.tokens,
            top_k=self.top_k,
        )

    @property
    def base_load(self) -> Tensor:
        """f of the base [L, E]. Needs at least one token."""
        return _load(self.base_counts)

    @property
    def tuned_load(self) -> Tensor:
        """f of the tuned model [L, E]. Needs at least one token."""
        return _load(self.tuned_counts)

    def drift(self) -> Drift:
        """The ratios. Needs at least one token."""
        assert self.tokens > 0, "no token was compared"
        base_LE, tuned_LE = self.base_load, self.tuned_load
        change_L = (tuned_LE - base_LE).abs().max(dim=1).values * base_LE.shape[1]
        return Drift(
            overlap=(self.shared.double() / (self.tokens * self.top_k)).tolist(),
            top1_agreement=(self.same_first.double() / self.tokens).tolist(),
            # Rounding alone can leave -1e-17.
            kl=(self.kl_sum / self.tokens).clamp(min=0).tolist(),
            js_load=jensen_shannon(base_LE, tuned_LE).tolist(),
            load_change=change_L.tolist(),
            tokens=self.tokens,
        )


def drift_sums(base: PerLayer, tuned: PerLayer, top_k: int) -> DriftSums:
    """Compares the routing of the same tokens, layer by layer: one layer at a time is alive in float64.

    Args:
        base, tuned: router logits or log-probabilities, [L, N, E] or [N, E] of each layer; real tokens only, and both
            in one precision, or ties between experts are broken differently.
        top_k: experts per token.
    """
    shared, same_first, kl_sum, base_counts, tuned_counts = [], [], [], [], []
    tokens = 0
    for base_NE, tuned_NE in zip(base, tuned, strict=True):
        assert base_NE.shape == tuned_NE.shape, (base_NE.shape, tuned_NE.shape)
        tokens, experts = base_NE.shape
        log_p_NE, log_q_NE = base_NE.double().log_softmax(-1), tuned_NE.double().log_softmax(-1)
        p_NK, q_NK = log_p_NE.topk(top_k).indices, log_q_NE.topk(top_k).indices
        shared.append((p_NK.unsqueeze(2) == q_NK.unsqueeze(1)).sum())
        same_first.append((p_NK[:, 0] == q_NK[:, 0]).sum())
        kl_sum.append((log_p_NE.exp() * (log_p_NE - log_q_NE)).sum())
        base_counts.append(torch.bincount(p_NK.reshape(-1), minlength=experts))
        tuned_counts.append(torch.bincount(q_NK.reshape(-1), minlength=experts))
    return DriftSums(
        shared=torch.stack(shared).cpu(),
        same_first=torch.stack(same_first).cpu(),
        kl_sum=torch.stack(kl_sum).cpu(),
        base_counts=torch.stack(base_counts).cpu(),
        tuned_counts=torch.stack(tuned_counts).cpu(),
        tokens=tokens,
        top_k=top_k,
    )


def drift(base_logprobs_LNE: PerLayer, tuned_logprobs_LNE: PerLayer, top_k: int) -> Drift:
    """`drift_sums` of at least one token, as ratios."""
    return drift_sums(base_logprobs_LNE, tuned_logprobs_LNE, top_k).drift()


def chance_overlap(experts: int, top_k: int) -> float:
    """Expected overlap of two independent uniform choices of k experts, k / E: what routing without memory scores."""
    return top_k / experts


def jensen_shannon(f_LE: Tensor, g_LE: Tensor) -> Tensor:
    """Jensen-Shannon divergence [L] of two distributions a layer, nats: H((f + g) / 2) - (H(f) + H(g)) / 2."""
    mean_LE = (f_LE + g_LE) / 2
    entropies = [torch.special.entr(x_LE.double()).sum(dim=1) for x_LE in (mean_LE, f_LE, g_LE)]
    return (entropies[0] - (entropies[1] + entropies[2]) / 2).clamp(min=0)


def drift_scalars(drift: Drift) -> dict[str, float]:
    """The few scalars to look at first, over all layers, by their logged names."""
    layers = len(drift.overlap)
    return {
        "router/drift/overlap_mean": sum(drift.overlap) / layers,
        "router/drift/overlap_worst": min(drift.overlap),
        "router/drift/top1_agreement_mean": sum(drift.top1_agreement) / layers,
        "router/drift/kl_mean": sum(drift.kl) / layers,
        "router/drift/kl_worst": max(drift.kl),
        "router/drift/js_load_worst": max(drift.js_load),
        "router/drift/load_change_worst": max(drift.load_change),
    }


def drift_vectors(drift: Drift) -> dict[str, list[float]]:
    """One value a layer by logged name, `router/drift/by_layer/kl`: for JSON, not for scalar loggers."""
    return {f"router/drift/by_layer/{name}": value for name, value in asdict(drift).items() if name != "tokens"}


def _load(counts_LE: Tensor) -> Tensor:
    return counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)
