"""Drift of saved adapters and models against a comparison of two plainly loaded models, token by token."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.adapter.adapter import load
from finetune.adapter.lora import add_attention_lora, save_adapter
from finetune.adapter.non_moe import save_non_moe, unfreeze_non_moe
from finetune.export.quantized import write_quantized
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import LoadedModel, load_base
from finetune.router.study.probe import read_probe
from tests.running import Ran, refused, run_finetune

EXPERTS, TOP_K, TOKENS = 4, 2, 900


@pytest.fixture(scope="module")
def moved_adapter(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes what the attention says."""
    folder = tmp_path_factory.mktemp("moved") / "adapter"
    loaded = load_base(BaseSpec(str(small_mixtral)), device="cpu")
    model = add_attention_lora(loaded.model, loaded.arch, r=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return saved(loaded, model, folder)


@pytest.fixture(scope="module")
def moved_non_moe(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A non-MoE tuning whose routers moved as well."""
    folder = tmp_path_factory.mktemp("moved") / "adapter"
    loaded = load_base(BaseSpec(str(small_mixtral), attention="16bit"), device="cpu")
    unfreeze_non_moe(loaded.model, loaded.arch, router=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_non_moe(loaded.model, folder, base={"path": str(small_mixtral)})
    return saved(loaded, None, folder)


def saved(loaded: LoadedModel, adapter: PeftModel | None, folder: Path) -> Path:
    if adapter is not None:
        save_adapter(adapter, folder)
    loaded.tokenizer.save_pretrained(folder)
    loaded.base.save(folder)
    return folder


def drift_of(*args: object) -> Ran:
    ran = run_finetune("router", "drift", *args, "--max-tokens", TOKENS, "--device", "cpu")
    assert ran.status == 0, ran.stderr
    return ran


def brute_force(base: LoadedModel, tuned: LoadedModel) -> dict[str, list[float]]:
    """Overlap, top-1 agreement and KL by layer, and the change of load, from logits row by row without packing."""
    rows = read_probe(base.tokenizer, max_tokens=TOKENS).rows
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in ("overlap", "top1_agreement", "kl")}
    counts = [[[0] * EXPERTS for _ in range(2)] for _ in range(2)]  # [layer][side][expert]
    tokens = 0
    for row in rows:
        sides: list[Any] = []
        for loaded in (base, tuned):
            with torch.no_grad():
                model: Any = loaded.model
                sides.append(model(input_ids=torch.tensor([row.ids]), output_router_logits=True).router_logits)
        tokens += len(row.ids)
        for layer, pair in enumerate(zip(*sides, strict=True)):
            for token in zip(*(side.tolist() for side in pair), strict=True):
                chosen, probs = [], []
                for side, logits in enumerate(token):
                    weights = [math.exp(x) for x in logits]
                    probs.append([w / sum(weights) for w in weights])
                    chosen.append(sorted(range(EXPERTS), key=lambda e, logits=logits: -logits[e])[:TOP_K])
                    for expert in chosen[side]:
                        counts[layer][side][expert] += 1
                sums["overlap"][layer] += len(set(chosen[0]) & set(chosen[1])) / TOP_K
                sums["top1_agreement"][layer] += chosen[0][0] == chosen[1][0]
                sums["kl"][layer] += sum(p * math.log(p / q) for p, q in zip(*probs, strict=True))
    found = {name: [value / tokens for value in values] for name, values in sums.items()}
    found["load_change"] = [
        max(abs(a - b) for a, b in zip(*sides, strict=True)) / (tokens * TOP_K) * EXPERTS for sides in counts
    ]
    return found


@pytest.mark.parametrize("kind", ["lora", "non_moe"])
def test_equals_two_models_side_by_side(
    kind: str, small_mixtral: Path, moved_adapter: Path, moved_non_moe: Path, tmp_path: Path
) -> None:
    folder = moved_adapter if kind == "lora" else moved_non_moe
    ran = drift_of(folder, "--out", tmp_path / "drift.json")
    document = json.loads((tmp_path / "drift.json").read_text())
    base = load_base(BaseSpec(str(small_mixtral), attention="nf4" if kind == "lora" else "16bit"), device="cpu")
    want = brute_force(base, load(str(folder), device="cpu"))
    for name, values in want.items():
        # A sum of rows in one pass is rounded otherwise than a row alone, which may turn one close choice of 900.
        close = {"abs": 2e-3} if name != "kl" else {"rel": 1e-3}
        assert document["overall"][name] == pytest.approx(values, **close), name
    assert document["overall"]["overlap"][1] < 0.99
    assert (document["overall"]["overlap"][0] < 1) or kind == "lora"
    assert document["chance_overlap"] == 0.5
    assert document["probe"] == {"name": "bundled", "rows": document["probe"]["rows"], "tokens": TOKENS}
    assert [domain["name"] for domain in document["domains"]][-1] == "code"
    assert sum(domain["tokens"] for domain in document["domains"]) == TOKENS
    mean = sum(d["tokens"] * d["overlap"][1] for d in document["domains"]) / TOKENS
    assert mean == pytest.approx(document["overall"]["overlap"][1])
    assert f"{document['overall']['overlap'][1]:.1%}" in ran.stdout
    assert "chance 50.0%" in ran.stdout


def test_an_untrained_adapter_has_not_drifted(saved_adapter: Path) -> None:
    document = drift_of(saved_adapter, "--json").document
    assert document["overall"]["overlap"] == [1.0, 1.0]
    assert document["overall"]["top1_agreement"] == [1.0, 1.0]
    # Measured 0: zero is added to the same products.
    assert max(document["overall"]["kl"]) < 1e-9
    assert document["base_load"] == document["tuned_load"]


def test_a_whole_model_against_its_base(small_mixtral: Path, tmp_path: Path) -> None:
    """The same model, quantized on the disk, routes as its base does when that is quantized on loading."""
    write_quantized(str(small_mixtral), tmp_path / "saved", attention="nf4", revision=None, device="cpu")
    document = drift_of(tmp_path / "saved", "--base", small_mixtral, "--json").document
    assert document["overall"]["overlap"] == [1.0, 1.0]
    assert document["base"] == str(small_mixtral)


def test_a_base_that_moved_is_named(saved_adapter: Path, small_mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "base.json").read_text())
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({**base, "path": "/gone/away"}))
    refused(tmp_path, "router", "drift", tmp_path / "adapter", says=("not where it was: /gone/away", "--base"))
    moved = drift_of(tmp_path / "adapter", "--base", small_mixtral, "--json").document
    assert moved["overall"]["overlap"] == [1.0, 1.0]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    refused(
        tmp_path, "router", "drift", tmp_path / "gone",
        says=("there is no adapter and no model", str(tmp_path / "gone"), "check the path"),
    )  # fmt: skip


def test_a_whole_model_without_its_base(tmp_path: Path, small_mixtral: Path) -> None:
    says = ("this is a whole model, which does not name the base", "name the base with --base")
    refused(tmp_path, "router", "drift", small_mixtral, says=says)


def test_two_shapes(tmp_path: Path, small_mixtral: Path) -> None:
    config = json.loads((small_mixtral / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    says = ("the two models are not of one shape", "2 layers of 4 experts, 2 a token")
    refused(tmp_path, "router", "drift", tmp_path / "other", "--base", small_mixtral, says=says)


def test_another_base(tmp_path: Path, saved_adapter: Path, small_mixtral: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(small_mixtral, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(small_mixtral)
    for parameter in model.parameters():
        parameter.data += 0.01
    model.save_pretrained(tmp_path / "other")
    says = ("the adapter was trained on another base: the routers differ",)
    refused(tmp_path, "router", "drift", saved_adapter, "--base", tmp_path / "other", says=says)


def test_empty_data(tmp_path: Path, saved_adapter: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    says = ("the data file is empty",)
    refused(tmp_path, "router", "drift", saved_adapter, "--data", tmp_path / "empty.jsonl", says=says)


def test_a_document_that_cannot_be_written(tmp_path: Path, saved_adapter: Path) -> None:
    says = ("the file cannot be written", "is a folder", "--out")
    refused(tmp_path, "router", "drift", saved_adapter, "--out", tmp_path, says=says)


def test_a_device_that_is_not_there(tmp_path: Path, saved_adapter: Path) -> None:
    says = ("there is no device 'tpu'", "auto, cpu, cuda")
    refused(tmp_path, "router", "drift", saved_adapter, "--device", "tpu", says=says)
