"""How good a model is on held-out conversations, and how far two models differ on the same tokens.

Both work on supervised rows (`input_ids`, `labels`), one sequence at a time without padding, and weight every token
alike. Differences of routing are measured on the experts that were chosen, layer by layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.routing.recording import recorded_routing

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fidelity:
    """How a candidate model differs from a reference on `tokens` predicted positions.

    reference_loss, candidate_loss: mean negative log-likelihood of the supervised tokens, nats.
    kl: mean KL(reference || candidate) of the next-token distributions, nats.
    greedy_agreement: share of positions with the same most likely token.
    top_k_overlap: mean over tokens and layers of |A and B| / k of the chosen experts.
    max_logit_difference: largest absolute difference of a logit.
    """

    tokens: int
    supervised_tokens: int
    reference_loss: float
    candidate_loss: float
    kl: float
    greedy_agreement: float
    top_k_overlap: float
    max_logit_difference: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def completion_loss(model: nn.Module, rows: Iterable[Row], device: torch.device) -> tuple[float, int]:
    """Mean negative log-likelihood (nats) of the supervised tokens of `rows`, and their number."""
    total, count = 0.0, 0
    for ids, labels in _sequences(rows, device):
        nll, supervised = _nll(model(input_ids=ids).logits[0], labels)
        total, count = total + nll, count + supervised
    return total / max(count, 1), count


@torch.no_grad()
def fidelity(
    model: nn.Module,
    candidate: Callable[[], contextlib.AbstractContextManager[None]],
    rows: Iterable[Row],
    device: torch.device,
    *,
    layers: int,
    top_k: int,
) -> Fidelity:
    """Compares `model` with itself inside the context `candidate()`, sequence by sequence.

    Only one sequence's logits [T, V] of each are alive at a time.
    """
    sums = dict.fromkeys(("tokens", "supervised", "ref_nll", "cand_nll", "kl", "agree", "overlap"), 0.0)
    largest = 0.0
    with recorded_routing(model) as recording:
        for ids, labels in _sequences(rows, device):
            reference, chosen = model(input_ids=ids).logits[0].float(), recording.indices
            with candidate():
                other, chosen_other = model(input_ids=ids).logits[0].float(), recording.indices
            nll, supervised = _nll(reference, labels)
            # In float32 the sum over 32,000 tokens is off by 1e-7 nats, as much as a merge loses.
            log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
            sums["tokens"] += reference.shape[0]
            sums["supervised"] += supervised
            sums["ref_nll"] += nll
            sums["cand_nll"] += _nll(other, labels)[0]
            sums["kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
            sums["agree"] += (reference.argmax(-1) == other.argmax(-1)).sum().item()
            sums["overlap"] += sum(_overlap(a, b) for a, b in zip(chosen, chosen_other, strict=True))
            largest = max(largest, (reference - other).abs().max().item())
    tokens, targets = max(sums["tokens"], 1), max(sums["supervised"], 1)
    return Fidelity(
        tokens=int(sums["tokens"]),
        supervised_tokens=int(sums["supervised"]),
        reference_loss=sums["ref_nll"] / targets,
        candidate_loss=sums["cand_nll"] / targets,
        kl=max(sums["kl"] / tokens, 0.0),
        greedy_agreement=sums["agree"] / tokens,
        top_k_overlap=sums["overlap"] / (tokens * layers * top_k),
        max_logit_difference=largest,
    )


@contextlib.contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts other modules in place while it lasts."""
    originals = {name: model.get_submodule(name) for name in replacements}
    for name, module in replacements.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)


def _sequences(rows: Iterable[Row], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for row in rows:
        yield (
            torch.tensor([row["input_ids"]], device=device),
            torch.tensor(row["labels"], device=device),
        )


def _nll(logits_TV: Tensor, labels_T: Tensor) -> tuple[float, int]:
    """Sum of negative log-likelihoods of the supervised next tokens, and their number."""
    targets = labels_T[1:]
    losses = nn.functional.cross_entropy(logits_TV[:-1].float(), targets, ignore_index=-100, reduction="sum")
    return losses.item(), int((targets != -100).sum())


def _overlap(a_TK: Tensor, b_TK: Tensor) -> int:
    """Number of experts chosen by both, over all tokens."""
    return int((a_TK.unsqueeze(-1) == b_TK.unsqueeze(-2)).sum())
