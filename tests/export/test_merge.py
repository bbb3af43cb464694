"""Merging: the merged model is the live adapter up to one bfloat16 rounding of W', and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import Moe4bitConfig
from finetune.data import Reading, Source, Teaching, encode_source
from finetune.export.merge import merge_adapter, merged_weight
from finetune.export.quantized import write_quantized
from finetune.model import load
from tests.export.tunings import tuned, tuned_non_moe
from tests.running import run_finetune


@pytest.mark.parametrize("attention", ["nf4", "16bit"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_weight_is_base_plus_update(
    small_mixtral: Path, tmp_path: Path, attention: str, lora: dict[str, bool]
) -> None:
    live = tuned(small_mixtral, tmp_path / "adapter", attention=attention, **lora)
    scaling = 16 / 8**0.5 if lora.get("use_rslora") else 16 / 8
    layers = [module for module in live.model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 8
    for layer in layers:
        weight = layer.get_base_layer().weight
        if attention == "nf4":
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        a, b = (getattr(layer, part)["default"].weight.double() for part in ("lora_A", "lora_B"))
        expected = weight.double() + scaling * b @ a
        if lora.get("use_dora"):
            norms = (expected**2).sum(1, keepdim=True).sqrt()
            expected = layer.lora_magnitude_vector["default"].weight.double()[:, None] * expected / norms
        torch.testing.assert_close(merged_weight(layer).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_folder_computes_what_the_live_adapter_computes(
    small_mixtral: Path, conversations: Path, tmp_path: Path, lora: dict[str, bool]
) -> None:
    live = tuned(small_mixtral, tmp_path / "adapter", **lora)
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = live.model(ids).logits
        without = {name: merged_weight(m) for name, m in live.model.named_modules() if isinstance(m, LoraLayer)}
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", data=str(conversations), max_rows=8, device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        found = merged(ids).logits
        # One rounding of W': put the rounded weights' unrounded originals back, and only summation order is left.
        for name, weight in without.items():
            module = merged.get_submodule(name.removeprefix("base_model.model."))
            assert torch.equal(module.weight, weight.to(torch.bfloat16).float())
            module.weight.data = weight
        unrounded = merged(ids).logits
    # Measured: 3e-7 unrounded, 1e-3 with bf16 W', logits of about 0.5.
    torch.testing.assert_close(unrounded, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert report is not None
    assert report.kl < 1e-5
    assert report.top_k_overlap > 0.98
    assert report.candidate_loss == pytest.approx(report.reference_loss, abs=1e-3)
    saved = json.loads((tmp_path / "merged" / "fidelity.json").read_text())
    assert saved["fidelity"] == report.to_dict()
    assert "`finetune serve ./merged`" in (tmp_path / "merged" / "SERVING.md").read_text()


def test_everything_but_attention_keeps_its_bits(small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    tuned(small_mixtral, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", data=str(conversations), max_rows=1, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(
        small_mixtral, quantization_config=Moe4bitConfig("16bit"), dtype=torch.bfloat16, device_map="cpu"
    )
    base.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]) == ("self_attn" not in name), name


def test_experts_in_fewer_bits_keep_theirs(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    low = tmp_path / "low"
    write_quantized(str(small_mixtral), low, experts="hqq2", device="cpu")
    merge_adapter(saved_adapter, tmp_path / "merged", base_path=str(low), device="cpu")
    before, after = (load_file(folder / "model.safetensors") for folder in (low, tmp_path / "merged"))
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 2 * 2
    for name in experts:
        assert torch.equal(after[name], before[name]), name
    assert load(str(tmp_path / "merged"), device="cpu").model.config.quantization_config.experts == "hqq2"


def test_fidelity_equals_brute_force(small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    """Against two full models run apart, with transformers' own loss and router logits."""
    live = tuned(small_mixtral, tmp_path / "adapter", scale=0.3)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", data=str(conversations), max_rows=4, device="cpu")
    merged = load(str(tmp_path / "merged"), device="cpu")
    rows = list(encode_source(Reading(Source(str(conversations), max_rows=4)), live.tokenizer, Teaching()).dataset)
    kl, agree, overlap, nll, tokens, supervised = 0.0, 0, 0, 0.0, 0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            a, b = (m.model(input_ids=ids, labels=labels, output_router_logits=True) for m in (live, merged))
        p, q = (out.logits[0].double().log_softmax(-1) for out in (a, b))
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        for x, y in zip(a.router_logits, b.router_logits, strict=True):
            for one, other in zip(x.topk(2).indices.tolist(), y.topk(2).indices.tolist(), strict=True):
                overlap += len(set(one) & set(other))
        targets = labels[0, 1:]
        nll += sum(-float(p[i, t]) for i, t in enumerate(targets.tolist()) if t != -100)
        tokens, supervised = tokens + ids.numel(), supervised + int((targets != -100).sum())
    assert report is not None
    assert (report.tokens, report.supervised_tokens) == (tokens, supervised)
    assert report.kl == pytest.approx(kl / tokens, rel=1e-2, abs=1e-8)
    assert report.greedy_agreement == agree / tokens
    assert report.top_k_overlap == overlap / (tokens * 2 * 2)
    assert report.reference_loss == pytest.approx(nll / supervised, rel=1e-5)


def test_non_moe_tuning_merges_by_one_rounding(small_mixtral: Path, tmp_path: Path) -> None:
    loaded = tuned_non_moe(small_mixtral, tmp_path / "adapter")
    ran = run_finetune("merge", tmp_path / "adapter", "--output", tmp_path / "merged", "--device", "cpu", "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["fidelity"] is None
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(after[name], parameter.detach().to(torch.bfloat16)), name


def test_generate_streams_the_same_greedy_tokens(small_mixtral: Path, tmp_path: Path) -> None:
    """The command's answer equals an argmax loop over the live adapter's logits, and what it streamed."""
    live = tuned(small_mixtral, tmp_path / "adapter", scale=0.3)
    message = [{"role": "user", "content": "What comes after 3?"}]
    ids = list(live.tokenizer.apply_chat_template(message, return_dict=True)["input_ids"])
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(live.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = live.tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()
    args = ("generate", tmp_path / "adapter", "--prompt", "What comes after 3?", "--max-new-tokens", 6)
    ran = run_finetune(*args, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["answers"] == [
        {"prompt": "What comes after 3?", "text": expected, "prompt_tokens": prompt, "completion_tokens": 6}
    ]
    assert run_finetune(*args).stdout.strip() == expected
