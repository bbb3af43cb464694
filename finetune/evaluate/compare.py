"""Runs a reference and others over the same held-out conversations and measures every one, and how far it is from the
reference.

One model is in memory at a time. What the reference says to a row (logits in the dtype that it computed, 64 KB a token
with 32,000 tokens and 16 bits) waits in a temporary file, its chosen experts in host memory; the others then go through
row by row. A conversation is the unit of the intervals; a long one that the data splits into rows counts as several.

Leaves out: generated text, and tasks with right answers.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets.utils import tqdm

from finetune.console import Report
from finetune.errors import DataError
from finetune.evaluate.divergence import KeptAnswers, Row, RowSums, row_sums, said_to
from finetune.evaluate.held_out import HeldOut
from finetune.evaluate.intervals import CONFIDENCE, DRAWS, Bootstrap, Estimate
from finetune.evaluate.models import Compared
from finetune.moe import LoadedModel


@dataclass(frozen=True)
class Measures:
    """A model on the held-out conversations; what needs a reference is None for the reference itself.

    loss, perplexity: of the supervised tokens.
    loss_difference: loss minus the reference's, on the same conversations.
    kl: KL(reference || model) of the next-token distributions, nats a token.
    greedy_agreement: share of tokens after which both say the same.
    top_k_overlap: share of the chosen experts that both chose, over all layers; `by_layer` of each.
    routed_alike: share of tokens whose chosen experts are the same in every layer; `kl_routed_alike` is the KL of these
        (None where there is none). The rest is of tokens whose router stood near a tie, where the least rounding
        decides: few, with a KL a thousand times the others'.
    """

    model: str
    stored: str
    loss: Estimate
    perplexity: Estimate
    loss_difference: Estimate | None = None
    kl: Estimate | None = None
    greedy_agreement: Estimate | None = None
    top_k_overlap: Estimate | None = None
    top_k_overlap_by_layer: tuple[Estimate, ...] | None = None
    routed_alike: Estimate | None = None
    kl_routed_alike: Estimate | None = None
    max_logit_difference: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The reference first, then the others, on the same conversations."""

    held_out: str | None
    conversations: int
    tokens: int
    supervised_tokens: int
    seed: int
    models: tuple[Measures, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": CONFIDENCE, "draws": DRAWS}


def compare(
    models: Sequence[Compared],
    held_out: HeldOut,
    *,
    max_rows: int,
    seed: int = 0,
    device: str = "auto",
    report: Report | None = None,
) -> Comparison:
    """Measures checked models, the reference first.

    Args:
        report: as `HeldOut.rows` has it.

    Raises:
        DataError: no conversation to compare on.
        OutputError: the disk has no room for what the reference says.
        FinetuneError: as `Compared.load` and `HeldOut.rows`.
    """
    require_data(held_out, models[0].name)
    first, others = models[0], models[1:]
    with tempfile.TemporaryDirectory(prefix="finetune-evaluate-") as folder:
        loaded = first.load(device)
        rows = held_out.rows(loaded.tokenizer, max_rows, report)
        if not rows:
            raise _no_data(first.name)
        kept = KeptAnswers(Path(folder) / "logits", loaded, rows if others else ())
        about = [_stored(first, loaded)]
        sums: list[list[RowSums]] = [[]]
        for said, labels in said_to(loaded.model, _shown(rows, first.name), loaded.device):
            # Against itself: what is its own, its loss, comes from the same function.
            sums[0].append(row_sums(said, said, labels))
            if others:
                kept.add(said)
        for other in others:
            # Before the next one comes; hooks and wrappers hold each other in circles.
            del loaded, said, labels
            gc.collect()
            loaded = other.load(device)
            about.append(_stored(other, loaded))
            answers = said_to(loaded.model, _shown(rows, other.name), loaded.device)
            sums.append([])
            for number, (said, labels) in enumerate(answers):
                sums[-1].append(row_sums(kept.said(number), said, labels))
    bootstrap, top_k = Bootstrap(len(rows), seed=seed), first.arch.top_k
    measured = [_measured(first.name, about[0], sums[0], bootstrap)]
    for model, stored, of_model in zip(others, about[1:], sums[1:], strict=True):
        measured.append(_against(_measured(model.name, stored, of_model, bootstrap), of_model, bootstrap, top_k))
    return Comparison(
        held_out=held_out.name,
        conversations=len(rows),
        tokens=sum(row.tokens for row in sums[0]),
        supervised_tokens=sum(row.supervised for row in sums[0]),
        seed=seed,
        models=tuple(measured),
    )


def require_data(held_out: HeldOut, model: str) -> None:
    """Refuses before anything loads where there is nothing to compare on.

    Raises:
        DataError: says how to name conversations.
    """
    if held_out.name is None:
        raise _no_data(model)


def _no_data(model: str) -> DataError:
    return DataError(
        "there are no held-out conversations to compare on",
        where=model,
        allowed="--data FILE, or an adapter in the folder of a run whose recipe holds conversations out",
        fix="name conversations that were not trained on with --data",
    )


def _shown(rows: Sequence[Row], name: str) -> Iterable[Row]:
    bar: Iterable[Row] = tqdm(rows, unit=" conversations", desc=f"Reading, {name}", delay=1)
    return bar


def _stored(model: Compared, loaded: LoadedModel) -> str:
    if model.kind == "16bit":
        return str(loaded.model.dtype).removeprefix("torch.")
    storage: Any = loaded.model.config.quantization_config
    return f"{storage.experts} experts, {storage.attention} attention"


def _measured(name: str, stored: str, sums: Sequence[RowSums], bootstrap: Bootstrap) -> Measures:
    loss = bootstrap.ratio([row.candidate_nll for row in sums], [row.supervised for row in sums])
    return Measures(name, stored, loss, loss.exp())


def _against(own: Measures, sums: Sequence[RowSums], bootstrap: Bootstrap, top_k: int) -> Measures:
    """With what needs the reference."""
    tokens, supervised = [row.tokens for row in sums], [row.supervised for row in sums]
    layers, alike = len(sums[0].shared), [row.alike for row in sums]

    def overlap(shared: Sequence[int], of_layers: int) -> Estimate:
        return bootstrap.ratio(shared, [count * top_k * of_layers for count in tokens])

    return Measures(
        own.model,
        own.stored,
        own.loss,
        own.perplexity,
        loss_difference=bootstrap.ratio([row.candidate_nll - row.reference_nll for row in sums], supervised),
        # Rounding alone can leave -1e-17.
        kl=bootstrap.ratio([max(row.kl, 0.0) for row in sums], tokens),
        greedy_agreement=bootstrap.ratio([row.agreed for row in sums], tokens),
        top_k_overlap=overlap([sum(row.shared) for row in sums], layers),
        top_k_overlap_by_layer=tuple(overlap([row.shared[layer] for row in sums], 1) for layer in range(layers)),
        routed_alike=bootstrap.ratio(alike, tokens),
        kl_routed_alike=bootstrap.ratio([max(row.alike_kl, 0.0) for row in sums], alike) if any(alike) else None,
        max_logit_difference=max(row.largest for row in sums),
    )
