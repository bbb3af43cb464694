"""How good a model is on held-out conversations, and how far two models differ on the same tokens.

Both work on supervised rows (`input_ids`, `labels`), one sequence at a time without padding, and weight every token
alike. Differences of routing are measured on the experts that were chosen, layer by layer.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data import IGNORED
from finetune.disk import require_space
from finetune.moe import LoadedModel
from finetune.router import Recording

Row = Mapping[str, Any]
# Positions whose distributions are alive in float64: of a long row the whole would take gigabytes.
_POSITIONS = 512


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


@dataclass(frozen=True)
class RowSums:
    """What one row adds to every measure of two models; losses and KL in nats.

    shared: chosen experts that both have in common, over all tokens, of each layer.
    alike, alike_kl: tokens whose chosen experts are the same in every layer, and their part of the KL.
    largest: the largest absolute difference of a logit.
    """

    tokens: int
    supervised: int
    reference_nll: float
    candidate_nll: float
    kl: float
    agreed: int
    shared: tuple[int, ...]
    alike: int
    alike_kl: float
    largest: float


@dataclass(frozen=True)
class Said:
    """What a model says to a row: logits [T, V], and the chosen experts int64 [T, K] of each layer."""

    logits: Tensor
    chosen: Sequence[Tensor]


@torch.no_grad()
def row_sums(reference: Said, candidate: Said, labels: Tensor) -> RowSums:
    """Compares what two models say to the same row.

    Args:
        reference: on any device; comes to the candidate's piece by piece.
        labels: int64 [T] on the candidate's device, -100 where a token is not supervised.
    """
    device = candidate.logits.device
    targets = torch.cat([labels[1:], labels.new_full((1,), IGNORED)])
    shared_LT = torch.stack(
        [_shared(a_TK.to(device), b_TK) for a_TK, b_TK in zip(reference.chosen, candidate.chosen, strict=True)]
    )
    alike_T = (shared_LT == candidate.chosen[0].shape[1]).all(0)
    reference_nll, candidate_nll, kl, alike_kl, agreed, largest = 0.0, 0.0, 0.0, 0.0, 0, 0.0
    pieces = (tensor.split(_POSITIONS) for tensor in (reference.logits, candidate.logits, targets, alike_T))
    for a_TV, b_TV, targets_T, same_T in zip(*pieces, strict=True):
        # In float32 the sum over 32,000 tokens is off by 1e-7 nats, as much as a merge loses.
        a_TV, b_TV = a_TV.to(device).double(), b_TV.double()
        log_p, log_q = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
        kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl, alike_kl = kl + kl_T.sum().item(), alike_kl + kl_T[same_T].sum().item()
        agreed += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        largest = max(largest, (a_TV - b_TV).abs().max().item())
        reference_nll += nn.functional.nll_loss(log_p, targets_T, ignore_index=IGNORED, reduction="sum").item()
        candidate_nll += nn.functional.nll_loss(log_q, targets_T, ignore_index=IGNORED, reduction="sum").item()
    return RowSums(
        tokens=len(labels),
        supervised=int((targets != IGNORED).sum()),
        reference_nll=reference_nll,
        candidate_nll=candidate_nll,
        kl=kl,
        agreed=agreed,
        shared=tuple(shared_LT.sum(1).tolist()),
        alike=int(alike_T.sum()),
        alike_kl=alike_kl,
        largest=largest,
    )


@torch.no_grad()
def said_to(model: nn.Module, rows: Iterable[Row], device: torch.device) -> Iterator[tuple[Said, Tensor]]:
    """What `model` says to every row, one after the other, and the row's labels [T] on the device.

    Raises:
        ModelError: the model has no routers.
    """
    with Recording(model) as recording:
        for ids, labels in _sequences(rows, device):
            logits = model(input_ids=ids).logits[0]
            yield Said(logits, recording.indices), labels


def fidelity(
    model: nn.Module,
    candidate: Callable[[], contextlib.AbstractContextManager[None]],
    rows: Sequence[Row],
    device: torch.device,
    *,
    layers: int,
    top_k: int,
) -> Fidelity:
    """Compares `model` with itself inside the context `candidate()`, sequence by sequence.

    Only one sequence's logits [T, V] of each are alive at a time.
    """
    sums = []
    for row in rows:
        ((reference, labels),) = said_to(model, [row], device)
        with candidate():
            ((other, _),) = said_to(model, [row], device)
        sums.append(row_sums(reference, other, labels))
    return _over(sums, layers * top_k)


def fidelity_between(
    reference: Callable[[], LoadedModel], candidate: Callable[[], LoadedModel], rows: Sequence[Row]
) -> Fidelity:
    """Compares two models, of which one is in memory at a time: `reference` and `candidate` load them.

    Raises:
        OutputError: the disk has no room for what the reference says.
        FinetuneError: as the two.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-evaluate-") as folder:
        loaded = reference()
        kept = KeptAnswers(Path(folder) / "logits", loaded, rows)
        for said, _ in said_to(loaded.model.eval(), rows, loaded.device):
            kept.add(said)
        # Before the next one comes; hooks and wrappers hold each other in circles.
        del loaded, said
        gc.collect()
        loaded = candidate()
        answers = enumerate(said_to(loaded.model.eval(), rows, loaded.device))
        sums = [row_sums(kept.said(number), said, labels) for number, (said, labels) in answers]
        return _over(sums, loaded.arch.layers * loaded.arch.top_k)


class KeptAnswers:
    """What a model said to rows: logits in a file, row after row, chosen experts in host memory.

    Raises:
        OutputError: the disk has no room.
    """

    def __init__(self, path: Path, loaded: LoadedModel, rows: Sequence[Row]):
        self._path, self._vocab = path, loaded.arch.vocab
        self._chosen: list[list[Tensor]] = []
        self._starts = [0]
        self._dtype = torch.float32
        needed = sum(len(row["input_ids"]) for row in rows) * self._vocab * loaded.model.dtype.itemsize
        require_space(path, needed, what="the reference's logits (fewer rows, or TMPDIR on another disk)")

    def add(self, said: Said) -> None:
        self._dtype = said.logits.dtype
        data = said.logits.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with self._path.open("ab") as file:
            data.tofile(file)
        self._starts.append(self._starts[-1] + data.nbytes)
        self._chosen.append([chosen.cpu() for chosen in said.chosen])

    def said(self, row: int) -> Said:
        start, end = self._starts[row : row + 2]
        raw = np.fromfile(self._path, dtype=np.uint8, count=end - start, offset=start)
        return Said(torch.from_numpy(raw).view(self._dtype).view(-1, self._vocab), self._chosen[row])


def _over(sums: Sequence[RowSums], choices: int) -> Fidelity:
    """Of all rows; `choices` is how many experts a token chooses over all layers."""
    tokens, supervised = sum(row.tokens for row in sums), sum(row.supervised for row in sums)
    positions, targets = max(tokens, 1), max(supervised, 1)
    return Fidelity(
        tokens=tokens,
        supervised_tokens=supervised,
        reference_loss=sum(row.reference_nll for row in sums) / targets,
        candidate_loss=sum(row.candidate_nll for row in sums) / targets,
        kl=max(sum(row.kl for row in sums) / positions, 0.0),
        greedy_agreement=sum(row.agreed for row in sums) / positions,
        top_k_overlap=sum(sum(row.shared) for row in sums) / (positions * choices),
        max_logit_difference=max((row.largest for row in sums), default=0.0),
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
    losses = nn.functional.cross_entropy(logits_TV[:-1].float(), targets, ignore_index=IGNORED, reduction="sum")
    return losses.item(), int((targets != IGNORED).sum())


def _shared(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """int64 [T]: number of experts chosen by both."""
    return (a_TK.unsqueeze(-1) == b_TK.unsqueeze(-2)).sum((1, 2))
