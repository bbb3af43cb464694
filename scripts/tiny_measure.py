"""What tiny-mixtral's card states: held-out loss by domain, unigram entropy, expert load, how routing differs.

Why: a small model in a repository is only worth something if its numbers can be checked. How: everything here is a
pure function of a model and token rows, so that the training script, the card and a later check use the same code.
The unigram entropy is the cross-entropy of held-out tokens under the domain's own token frequencies: what a model
that ignores all context would score. Routing differs when the Jensen-Shannon divergence of expert load between two
domains exceeds that between two halves of one domain.

Leaves out perplexity per word or byte: losses are nats per token of the Mixtral tokenizer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from text_packages import DOMAINS
from torch.nn import functional as F

BOS = 1
HELDOUT_TOKENS = 65_536  # of a domain, at most


@dataclass(frozen=True)
class DomainReport:
    """Measurements of one domain: `load_LE` is each expert's share of the assignments of a layer (rows sum to 1)."""

    domain: str
    train_tokens: int
    heldout_tokens: int
    loss: float
    unigram: float
    load_LE: list[list[float]]
    halves_js_L: list[float]


def stream_rows(ids: np.ndarray, length: int, limit: int) -> np.ndarray:
    """Cuts a token stream into rows of `<s>` and `length` tokens; the last, shorter one is dropped unless alone."""
    ids = ids[:limit].astype(np.int64)
    length = min(length, ids.size)
    rows = ids[: ids.size // length * length].reshape(-1, length)
    return np.concatenate([np.full((rows.shape[0], 1), BOS), rows], axis=1)


def unigram_entropy(train: np.ndarray, heldout: np.ndarray, vocab: int) -> float:
    """Cross-entropy (nats a token) of held-out tokens under add-one smoothed training frequencies."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits: 0 for equal distributions, 1 for disjoint ones."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, x * np.log2(x / middle), 0.0).sum() for x in (p, q)]
    return float(sum(terms) / 2)


@torch.inference_mode()
def loss_and_counts(model: Any, rows: np.ndarray, batch: int = 16) -> tuple[float, np.ndarray]:
    """Mean loss of the rows, and expert counts [rows, layers, experts] of every token that predicts one."""
    device, top_k = model.device, model.config.num_experts_per_tok
    total, counts = torch.zeros((), device=device, dtype=torch.float64), []
    for start in range(0, len(rows), batch):
        ids_BT = torch.from_numpy(rows[start : start + batch]).to(device)
        out = model.model(input_ids=ids_BT[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state).float()
        total += F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").double()
        logits_LBTE = torch.stack(out.router_logits).unflatten(1, (ids_BT.shape[0], -1))
        chosen = F.one_hot(logits_LBTE.topk(top_k, dim=-1).indices, logits_LBTE.shape[-1])
        counts.append(chosen.sum(dim=(2, 3)).transpose(0, 1).cpu().numpy())
    return float(total) / (rows.shape[0] * (rows.shape[1] - 1)), np.concatenate(counts)


def measure_domain(model: Any, domain: str, train: np.ndarray, heldout: np.ndarray, length: int) -> DomainReport:
    """All measurements of a domain on its held-out documents."""
    rows = stream_rows(heldout, length, HELDOUT_TOKENS)
    loss, counts_RLE = loss_and_counts(model, rows)
    first, second = counts_RLE[: len(rows) // 2].sum(0), counts_RLE[len(rows) // 2 :].sum(0)
    load = (first + second) / (first + second).sum(-1, keepdims=True)
    halves = [jensen_shannon(a / max(a.sum(), 1), b / b.sum()) for a, b in zip(first, second, strict=True)]
    unigram = unigram_entropy(train, rows[:, 1:].flatten(), model.config.vocab_size)
    return DomainReport(domain, train.size, rows[:, 1:].size, loss, unigram, load.tolist(), halves)


def measure(model: Any, corpus: Any, length: int) -> list[DomainReport]:
    """Measures every domain of a corpus that `tiny_corpus.py` wrote."""
    return [
        measure_domain(model, domain, corpus[f"{domain}/train"], corpus[f"{domain}/heldout"], length)
        for domain in DOMAINS
    ]


def routing_divergence(reports: list[DomainReport]) -> list[tuple[float, float]]:
    """(between domains, within a domain) a layer: mean divergence over pairs of domains, and over halves of one."""
    loads = [np.asarray(report.load_LE) for report in reports]
    between = [
        np.mean([jensen_shannon(a[layer], b[layer]) for a, b in itertools.combinations(loads, 2)])
        for layer in range(len(loads[0]))
    ]
    within = np.mean([report.halves_js_L for report in reports], axis=0)
    return [(float(a), float(b)) for a, b in zip(between, within, strict=True)]
