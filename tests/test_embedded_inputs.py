"""The repository's own model and data: sizes, shape, schema, no leakage, and that the model's card tells the truth.

Every check recomputes from the files. The card's numbers come from whole held-out documents; here short passages of
them are enough to show that the model predicts far better than token frequencies, and routes by domain.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-mixtral"
MODEL, DATA = RECIPE / "model", RECIPE / "data"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {name: read_jsonl(DATA / f"{name}.jsonl") for name in ("train", "heldout")}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def probe() -> dict[str, list[list[int]]]:
    """Token ids of every second passage of the probe, by domain: enough, and twice as fast."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    passages = defaultdict(list)
    for row in read_jsonl(DATA / "probe.jsonl")[::2]:
        passages[row["domain"]].append(tokenizer(row["text"]).input_ids)
    return dict(passages)


@torch.inference_mode()
def read_passages(model: Any, passages: list[list[int]]) -> tuple[float, list[list[list[float]]]]:
    """Mean loss a token, and the load [half][layer][expert] of the first and the second half of the passages."""
    loss, tokens = 0.0, 0
    shape = (2, model.config.num_hidden_layers, model.config.num_local_experts)
    counts = torch.zeros(shape, dtype=torch.float64)
    for place, ids in enumerate(passages):
        out = model(torch.tensor([ids]), output_router_logits=True)
        loss += F.cross_entropy(out.logits[0, :-1], torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            counts[2 * place // len(passages), layer] += torch.bincount(chosen, minlength=logits.shape[-1])
    return loss / tokens, (counts / counts.sum(-1, keepdim=True)).tolist()


@pytest.fixture(scope="module")
def readings(model: Any, probe: dict[str, list[list[int]]]) -> dict[str, tuple[float, list[list[list[float]]]]]:
    return {domain: read_passages(model, passages) for domain, passages in probe.items()}


# ---- sizes and shape ------------------------------------------------------------------------------------


def test_weights_and_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 16_000_000
    instructions = sum((DATA / f"{name}.jsonl").stat().st_size for name in ("train", "heldout"))
    assert instructions <= 1_000_000
    assert (DATA / "probe.jsonl").stat().st_size <= 60_000


def test_config_is_a_mixtral_whose_quantized_dimensions_are_multiples_of_64() -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["num_hidden_layers"] >= 4
    assert config["vocab_size"] == 32000
    assert config["dtype"] == "bfloat16"
    query, key_value = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    assert all(size % 64 == 0 for size in (config["hidden_size"], config["intermediate_size"], query, key_value))


def test_special_tokens_of_config_and_tokenizer_agree() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    expected = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    assert {name: config[name] for name in expected} == expected
    assert {name: generation[name] for name in expected} == expected


def test_weights_are_bf16_in_the_hubs_layout(model: Any) -> None:
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert header["model.layers.0.block_sparse_moe.experts.7.w2.weight"]["shape"] == [128, 192]
    elements = sum(math.prod(tensor["shape"]) for tensor in header.values())
    assert elements == sum(parameter.numel() for parameter in model.parameters())


# ---- the instruction set --------------------------------------------------------------------------------


def normalised(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", plain.casefold())) or text


def messages_of(rows: list[dict[str, Any]], role: str) -> set[str]:
    return {normalised(m["content"]) for row in rows for m in row["messages"] if m["role"] == role}


def test_every_row_is_a_conversation_that_ends_with_an_answer(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert 1000 <= len(splits["train"]) <= 1600
    assert 0.08 <= len(splits["heldout"]) / (len(splits["train"]) + len(splits["heldout"])) <= 0.12
    for row in itertools.chain(*splits.values()):
        assert set(row) == {"messages", "source", "language"}
        assert len(row["messages"]) % 2 == 0
        for place, message in enumerate(row["messages"]):
            assert set(message) == {"role", "content"}
            assert message["role"] == ("user", "assistant")[place % 2]
            assert message["content"].strip() == message["content"] != ""


def test_both_splits_hold_every_language_and_source(splits: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {name: {(r["language"], r["source"].split("/")[0]) for r in rows} for name, rows in splits.items()}
    assert kinds["train"] == kinds["heldout"]
    assert {language for language, _ in kinds["train"]} == {"en", "de", "fr", "es", "it"}


def test_no_opening_question_comes_twice(splits: dict[str, list[dict[str, Any]]]) -> None:
    for language in ("en", "de", "fr", "es", "it"):
        rows = [row for row in itertools.chain(*splits.values()) if row["language"] == language]
        assert len({normalised(row["messages"][0]["content"]) for row in rows}) == len(rows)


def test_nothing_held_out_stands_in_train(splits: dict[str, list[dict[str, Any]]]) -> None:
    for role in ("user", "assistant"):
        assert not messages_of(splits["train"], role) & messages_of(splits["heldout"], role)


def test_no_held_out_question_is_nearly_one_of_train(splits: dict[str, list[dict[str, Any]]]) -> None:
    def trigrams(row: dict[str, Any]) -> set[str]:
        text = f" {normalised(row['messages'][0]['content'])} "
        return {text[i : i + 3] for i in range(len(text) - 2)}

    train = [trigrams(row) for row in splits["train"]]
    for row in splits["heldout"]:
        own = trigrams(row)
        assert max(len(own & other) / len(own | other) for other in train) < 0.7, row


def test_the_tokens_fit_a_run_on_a_laptop(splits: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [message["content"] for row in splits["train"] for message in row["messages"]]
    assert sum(map(len, tokenizer(texts).input_ids)) < 60_000


def test_data_card_carries_the_counts_and_the_licences(splits: dict[str, list[dict[str, Any]]]) -> None:
    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"| all rows | {len(splits['train'])} | {len(splits['heldout'])} |" in card
    assert "Redistributions in binary form must reproduce the above copyright notice" in card
    assert "Permission is hereby granted, free of charge" in card


# ---- the model tells domains apart ----------------------------------------------------------------------


def test_the_model_beats_the_unigram_entropy_of_its_card(readings: dict[str, Any]) -> None:
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert [report["domain"] for report in facts["domains"]] == list(readings)
    for report in facts["domains"]:
        assert f"| {report['domain']} | {report['loss']:.3f} | {report['unigram']:.3f} |" in card
        # The probe's passages lack the context of a whole row, so their loss lies above the card's.
        assert readings[report["domain"]][0] < report["unigram"] - 1.5


def jensen_shannon(p: list[float], q: list[float]) -> float:
    """In bits, term by term."""
    total = 0.0
    for x, y in zip(p, q, strict=True):
        total += sum(0.5 * z * math.log2(z / ((x + y) / 2)) for z in (x, y) if z > 0)
    return total


def test_routing_differs_more_between_domains_than_within_one(readings: dict[str, Any], model: Any) -> None:
    loads = {domain: load for domain, (_, load) in readings.items()}
    for layer in range(model.config.num_hidden_layers):
        within = [jensen_shannon(first[layer], second[layer]) for first, second in loads.values()]
        # One half each, so that both numbers carry the noise of as many tokens.
        between = [jensen_shannon(a[0][layer], b[1][layer]) for a, b in itertools.permutations(loads.values(), 2)]
        assert sum(between) / len(between) > 2 * sum(within) / len(within)


def test_no_expert_is_dead(readings: dict[str, Any], model: Any) -> None:
    for layer in range(model.config.num_hidden_layers):
        loads = [half[layer] for _, halves in readings.values() for half in halves]
        mean = [sum(load[expert] for load in loads) / len(loads) for expert in range(model.config.num_local_experts)]
        assert min(mean) * len(mean) > 0.3


def test_four_bit_experts_cost_little(probe: dict[str, list[list[int]]], readings: dict[str, Any]) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for layer in quantized.model.layers:
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            for matrix in stack.data:
                packed = quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
                matrix.copy_(dequantize_4bit(*packed))
    for domain in ("python", "german"):
        assert abs(read_passages(quantized, probe[domain])[0] - readings[domain][0]) < 0.15
