"""Tiny random models of the three families, and a count of their routing that shares nothing with the capture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from finetune.router.metrics import RouterSums

LAYERS, VOCAB = 3, 64
Count = tuple[list[list[int]], list[list[float]], int]  # counts [L][E], probability sums [L][E], tokens
# family -> (experts, top-k)
FAMILIES = {"mixtral": (8, 2), "qwen3_moe": (6, 3), "olmoe": (8, 4)}


def build_model(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    experts, top_k = FAMILIES[family]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": top_k,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, intermediate_size=32, num_local_experts=experts))
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**common, intermediate_size=32, moe_intermediate_size=16, num_experts=experts, head_dim=8)
        )
    else:
        model = OlmoeForCausalLM(OlmoeConfig(**common, intermediate_size=16, num_experts=experts))
    # The initial router is nearly undecided; make it choose, so that a wrong count shows.
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=0.5)
    return model


def brute_force_count(model: nn.Module, rows: list[list[int]], experts: int, top_k: int) -> Count:
    """Counts and probability sums [L][E], one unpadded row at a time, from the logits that transformers returns."""
    counts = [[0] * experts for _ in range(LAYERS)]
    prob_sum = [[0.0] * experts for _ in range(LAYERS)]
    was_training = model.training
    model.eval()
    for row in rows:
        with torch.no_grad():
            router_logits = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for layer, logits in enumerate(router_logits):
            assert logits.shape == (len(row), experts)
            for token in logits.tolist():
                largest = max(token)
                weights = [math.exp(x - largest) for x in token]
                for expert, weight in enumerate(weights):
                    prob_sum[layer][expert] += weight / sum(weights)
                for expert in sorted(range(experts), key=lambda e: -token[e])[:top_k]:
                    counts[layer][expert] += 1
    model.train(was_training)
    return counts, prob_sum, sum(len(row) for row in rows)


def sums_of(
    routing: Sequence[Sequence[Sequence[float]]],
    top_k: int,
    documents: Sequence[int] | None = None,
    chosen: Sequence[Sequence[int]] | None = None,
) -> RouterSums:
    """`RouterSums` of router logits [layer][token][expert], by loops over tokens in float64.

    Args:
        documents: the document that each token belongs to; one without it.
        chosen: tokens that count, all without it. A pair belongs to where its second token does.
    """
    layers, tokens, experts = len(routing), len(routing[0]), len(routing[0][0])
    documents = [0] * tokens if documents is None else documents
    counted = range(tokens) if chosen is None else chosen
    counts = [[0] * experts for _ in range(layers)]
    prob_sum = [[0.0] * experts for _ in range(layers)]
    z_sum, entropy_sum, top1_sum = [0.0] * layers, [0.0] * layers, [0.0] * layers
    same_first, shared_any, pairs = [0] * layers, [0] * layers, 0
    for layer, row in enumerate(routing):
        best = [sorted(range(experts), key=lambda e, token=token: -token[e])[:top_k] for token in row]
        pairs = 0
        for index in counted:
            total = sum(math.exp(x) for x in row[index])
            probs = [math.exp(x) / total for x in row[index]]
            for expert in best[index]:
                counts[layer][expert] += 1
            prob_sum[layer] = [a + b for a, b in zip(prob_sum[layer], probs, strict=True)]
            z_sum[layer] += math.log(total) ** 2
            entropy_sum[layer] -= sum(p * math.log(p) for p in probs if p > 0)
            top1_sum[layer] += max(probs)
            if index > 0 and documents[index] == documents[index - 1]:
                pairs += 1
                same_first[layer] += best[index][0] == best[index - 1][0]
                shared_any[layer] += bool(set(best[index]) & set(best[index - 1]))

    def double(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return RouterSums(
        counts=torch.tensor(counts),
        prob_sum=double(prob_sum),
        tokens=len(counted),
        top_k=top_k,
        z_sum=double(z_sum),
        entropy_sum=double(entropy_sum),
        top1_sum=double(top1_sum),
        pairs=pairs,
        same_first=torch.tensor(same_first),
        shared_any=torch.tensor(shared_any),
    )


def brute_force_sums(
    model: nn.Module, rows: list[list[int]], top_k: int, learnt: Callable[[int, int], bool] = lambda row, token: True
) -> RouterSums:
    """`sums_of` the rows' tokens for which `learnt(row, token)` holds, from one unpadded row at a time."""
    was_training = model.training
    model.eval()
    logits: list[list[list[float]]] = [[] for _ in range(LAYERS)]
    for row in rows:
        with torch.no_grad():
            said = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for layer, tokens in enumerate(said):
            logits[layer] += tokens.tolist()
    model.train(was_training)
    documents = [index for index, row in enumerate(rows) for _ in row]
    places = [(index, token) for index, row in enumerate(rows) for token in range(len(row))]
    return sums_of(logits, top_k, documents, [n for n, place in enumerate(places) if learnt(*place)])


def assert_sums(got: RouterSums, want: RouterSums) -> None:
    """Integers equal; sums within what fp32 loses against float64, a few 1e-7 a token."""
    assert (got.tokens, got.pairs, got.top_k) == (want.tokens, want.pairs, want.top_k)
    for name in ("counts", "same_first", "shared_any"):
        assert getattr(got, name).tolist() == getattr(want, name).tolist(), name
    for name in ("prob_sum", "z_sum", "entropy_sum", "top1_sum"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6 * (want.tokens + 1))


def pad_right(rows: list[list[int]]) -> dict[str, Tensor]:
    """A padded batch with its attention mask and labels."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def assert_counts(sums: RouterSums, want: Count) -> None:
    """Asserts that what was captured equals a brute-force count."""
    counts, prob_sum, tokens = want
    assert sums.tokens == tokens
    assert sums.counts.tolist() == counts
    # fp32 softmax against float64, summed: a few 1e-7 a token.
    torch.testing.assert_close(sums.prob_sum, torch.tensor(prob_sum).double(), rtol=1e-5, atol=1e-6 * tokens)
