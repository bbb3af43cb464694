"""The estimate against numbers counted otherwise: tensors of real models, FACTS of Mixtral 8x7B, brute force."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from finetune.memory.run import GIB, Run
from finetune.memory.static import nf4_bytes
from finetune.memory.totals import MemoryEstimate, estimate
from finetune.moe import Moe4bitConfig
from finetune.moe.arch import MoeArch
from finetune.moe.census import take_census
from tests.models import tiny_config, tiny_model

MIXTRAL = MoeArch.from_config(MixtralConfig().to_dict())
ARCHS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": MoeArch.from_config(Qwen3MoeConfig().to_dict()),
    "olmoe": MoeArch.from_config(OlmoeConfig().to_dict()),
}
SMALL = replace(MIXTRAL, layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocab=1000)


def estimated(arch: MoeArch, *, device_bytes: int | None = None, **run: Any) -> MemoryEstimate:
    return estimate(Run(arch, **run), device_bytes=device_bytes)


def kept(arch: MoeArch) -> dict[str, int]:
    """Without checkpointing."""
    return {"keep_attention": arch.layers, "keep_gate_up": arch.layers}


def item(result: MemoryEstimate, name: str) -> int:
    (found,) = [entry.bytes for entry in result.items if entry.name == name]
    return found


# ---- weights are exact ----------------------------------------------------------------------------------------


def test_mixtral_8x7b_weighs_what_was_measured():
    result = estimated(MIXTRAL)
    assert round(item(result, "experts") / 1e9, 2) == 23.26
    assert round(item(result, "experts") / 32 / 1e6) == 727
    assert round(item(result, "attention") / 1e9, 2) == 0.69
    assert round(item(result, "embeddings and head") / 1e9, 2) == 0.52
    assert round(result.weight_bytes / GIB, 1) == 22.8
    assert round(item(estimated(MIXTRAL, attention_storage="16bit"), "attention") / 1e9, 2) == 2.68
    assert item(result, "LoRA") == 4 * 13_631_488
    assert result.trained_bytes == 4 * 13_631_488
    assert item(result, "optimizer") == 8 * 13_631_488
    assert result.checkpoint_bytes == 12 * 13_631_488


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (320, 64), (256, 1088), (1024, 4096)])
def test_a_matrix_in_nf4_takes_the_bytes_that_bitsandbytes_allocates(shape: tuple[int, int]):
    packed, state = bnb.quantize_4bit(torch.ones(shape), blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = [packed, state.absmax, state.state2.absmax, state.offset]
    assert nf4_bytes(shape[0] * shape[1]) == sum(tensor.nbytes for tensor in tensors)


def test_the_weights_of_a_quantized_model_to_the_byte(tmp_path: Path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    arch = MoeArch.from_config(tiny_config("mixtral").to_dict())
    for storage in ("nf4", "16bit"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=Moe4bitConfig(attention=storage), dtype=torch.bfloat16
        )
        result = estimated(arch, attention_storage=storage)
        counted: dict[str, int] = {}
        for row in take_census(model).rows:
            counted[row.role] = counted.get(row.role, 0) + row.bytes
        assert item(result, "experts") == counted["experts"]
        assert item(result, "attention") == counted["attention"]
        assert item(result, "embeddings and head") == counted["embedding"] + counted["head"]
        assert item(result, "norms") == counted["norm"]
        assert item(result, "router") == counted["router"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_trained_parameters_are_counted_as_peft_makes_them(use_dora: bool):
    model, targets = tiny_model("mixtral"), ("q_proj", "v_proj")
    arch = MoeArch.from_config(model.config.to_dict())
    everything_else = sum(p.numel() for name, p in model.named_parameters() if ".mlp." not in name)
    assert estimated(arch, method="non_moe", attention_storage="16bit").trained_bytes == 4 * everything_else
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules=list(targets), use_dora=use_dora))
    count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    result = estimated(arch, lora_r=8, lora_targets=targets, use_dora=use_dora)
    assert item(result, "LoRA") == 4 * count


def test_masters_are_float32_and_the_router_trains_only_when_asked():
    frozen = estimated(MIXTRAL, method="non_moe", attention_storage="16bit")
    trained = estimated(MIXTRAL, method="non_moe", attention_storage="16bit", router=True)
    assert item(frozen, "attention") == 4 * MIXTRAL.attention_params
    assert item(frozen, "router") == item(trained, "router") == 4 * MIXTRAL.router_params
    assert trained.trained_bytes - frozen.trained_bytes == 4 * MIXTRAL.router_params
    eight_bit = estimated(MIXTRAL, method="non_moe", attention_storage="16bit", optimizer="adamw_8bit")
    assert 0.25 < item(eight_bit, "optimizer") / item(frozen, "optimizer") < 0.26
    unknown = estimated(MIXTRAL, optimizer="muon_of_tomorrow")
    assert item(unknown, "optimizer") == 8 * 13_631_488
    assert "not known here: counted as AdamW" in {i.name: i.detail for i in unknown.items}["optimizer"]


# ---- monotone -------------------------------------------------------------------------------------------------


RUNS = st.fixed_dictionaries(
    {
        "micro_batch": st.integers(1, 64),
        "seq_len": st.integers(1, 8192),
        "lora_r": st.integers(1, 128),
        "processes": st.integers(1, 8),
        "accumulation": st.integers(1, 4),
        "keep_attention": st.integers(0, 16),
        "keep_gate_up": st.integers(0, 16),
        "backend": st.sampled_from(["grouped", "loop"]),
        "fused_layers": st.booleans(),
        "attention_storage": st.sampled_from(["nf4", "16bit"]),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
        "device": st.sampled_from(["cuda", "cpu"]),
    }
)


@given(arch=st.sampled_from(sorted(ARCHS)), run=RUNS, key=st.sampled_from(["micro_batch", "seq_len", "lora_r"]))
@settings(max_examples=60, deadline=None)
def test_more_of_anything_needs_more(arch: str, run: dict, key: str):
    less = estimated(ARCHS[arch], **run)
    more = estimated(ARCHS[arch], **{**run, key: run[key] + 1})
    assert more.total_bytes > less.total_bytes
    assert all(entry.bytes >= 0 for entry in less.items)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_choices_that_save_memory_do(arch: str):
    run = {"micro_batch": 4, "seq_len": 2048}
    lora = estimated(ARCHS[arch], **run)
    for costly in (
        estimated(ARCHS[arch], **run, **kept(ARCHS[arch])),
        estimated(ARCHS[arch], **run, keep_attention=3),
        estimated(ARCHS[arch], **run, keep_gate_up=3),
        estimated(ARCHS[arch], **run, attention_storage="16bit"),
        estimated(ARCHS[arch], **run, method="non_moe", attention_storage="16bit"),
        estimated(ARCHS[arch], **run, processes=2),
        estimated(ARCHS[arch], **run, dtype="float32"),
        estimated(ARCHS[arch], **run, use_dora=True),
    ):
        assert costly.total_bytes > lora.total_bytes
    assert "fixed" not in {entry.kind for entry in estimated(ARCHS[arch], **run, device="cpu").items}
    assert estimated(ARCHS[arch], **run, backend="loop").total_bytes < lora.total_bytes


# ---- fitting --------------------------------------------------------------------------------------------------


@given(
    budget=st.integers(0, 3 * 2**30),
    seq_len=st.sampled_from([64, 500, 4096]),
    checkpointing=st.booleans(),
    device=st.sampled_from(["cuda", "cpu"]),
)
@settings(max_examples=40, deadline=None)
def test_the_largest_micro_batch_is_the_largest(budget: int, seq_len: int, checkpointing: bool, device: str):
    run = {"seq_len": seq_len, "device": device} | ({} if checkpointing else kept(SMALL))
    found = estimated(SMALL, **run, device_bytes=budget).largest_micro_batch
    brute_force = 0
    while estimated(SMALL, **run, micro_batch=brute_force + 1).total_bytes <= budget:
        brute_force += 1
    assert found == brute_force


def test_the_classic_run_fits_one_80_gb_gpu_and_not_a_24_gb_one():
    classic = estimated(MIXTRAL, micro_batch=2, seq_len=1024, device_bytes=80 * 10**9)
    assert classic.fits
    assert classic.advice == ()
    assert classic.largest_micro_batch is not None
    assert classic.largest_micro_batch > 8
    small = estimated(MIXTRAL, micro_batch=2, seq_len=1024, device_bytes=24 * 10**9)
    assert not small.fits
    assert small.largest_micro_batch == 0
    assert small.advice[0].startswith("set training.per_device_train_batch_size: 1, and more")
    assert small.advice[0].endswith("GiB, not enough alone")
    assert small.overrides == ()
    assert re.fullmatch(
        r"nothing of this model fits into 22.35 GiB; the least is 2[34]\.\d\d GiB: a card of 32 GB", small.what_fits
    )


def test_advice_names_the_keys_and_says_what_each_would_come_to():
    run = {"micro_batch": 16, "seq_len": 2048, "device_bytes": 40 * GIB}
    result = estimated(MIXTRAL, **run, **kept(MIXTRAL), attention_storage="16bit")
    text = "\n".join(result.advice)
    assert "set training.gradient_checkpointing: auto: " in text
    assert "set training.per_device_train_batch_size: 1," in text
    assert "set quantization.attention: nf4: " in text
    checkpointed = estimated(MIXTRAL, **run, attention_storage="16bit")
    assert f"auto: {checkpointed.total_bytes / GIB:.2f} GiB, " in text
    assert result.overrides, "one sequence, checkpointed, with NF4 attention fits"

    full = estimated(MIXTRAL, method="non_moe", attention_storage="16bit", seq_len=1024, device_bytes=47 * GIB)
    text = "\n".join(full.advice)
    assert "set training.optim: paged_adamw_8bit: " in text
    assert "set trainable.method: attention_lora with quantization.attention: nf4: " in text
    assert ", fits" in text

    long = estimated(MIXTRAL, seq_len=32768, device_bytes=30 * GIB)
    assert [line for line in long.advice if line.startswith("set training.max_length: 8192: ")]


@pytest.mark.parametrize("micro_batch", [1, 8, 64])
def test_an_advised_batch_size_fits_when_it_says_so(micro_batch: int):
    for gib in range(24, 80, 8):
        result = estimated(MIXTRAL, micro_batch=micro_batch, seq_len=4096, device_bytes=gib * GIB)
        for line in result.advice:
            if "per_device_train_batch_size" in line and line.endswith(", fits"):
                batch = int(line.split("batch_size: ")[1].split(",")[0])
                assert estimated(MIXTRAL, micro_batch=batch, seq_len=4096).total_bytes <= gib * GIB
        assert bool(result.advice) == (not result.fits)


def test_an_unknown_device_gives_no_verdict():
    result = estimated(MIXTRAL)
    assert result.fits
    assert result.largest_micro_batch is None
    assert result.advice == ()


# ---- presentation ---------------------------------------------------------------------------------------------


def test_the_document_adds_up():
    result = estimated(MIXTRAL, device_bytes=80 * GIB)
    assert (result.items[0].name, result.items[0].detail) == ("experts", "NF4, double quantization: 45.10 B weights")
    assert round(result.items[0].bytes / GIB, 2) == 21.67
    document = json.loads(json.dumps(result.to_dict()))
    assert document["total_bytes"] == sum(entry["bytes"] for entry in document["items"]) == result.total_bytes
    assert document["fits"] is True
    assert {entry["kind"] for entry in document["items"]} == {"weights", "training", "step", "fixed"}
