"""Quantizing while loading, saving, and loading again, for every supported family and layout.

Truth: bitsandbytes' `quantize_4bit` of each expert's matrix as the checkpoint file holds it; for what was saved, the
bits in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from finetune.moe.config import QUANT_METHOD
from tests.models import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    save_fused,
    tiny_model,
)
from tests.moe.loading import (
    STORAGES,
    add_lora,
    assert_same_bits,
    bits,
    copy_lora,
    load,
    logits,
    lora_gradients,
    reload,
    tensors_of,
)

# What the hub calls the projections of an expert: gate, up, down.
HUB_NAMES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def expert_matrices(family: str, file: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    """One expert's two matrices from the hub's three, gate's rows first."""
    experts, gate, up, down = HUB_NAMES[family]
    prefix = f"model.layers.{layer}.{experts}.{expert}"
    return {
        "gate_up_proj": torch.cat([file[f"{prefix}.{gate}.weight"], file[f"{prefix}.{up}.weight"]]),
        "down_proj": file[f"{prefix}.{down}.weight"],
    }


def assert_experts_equal_by_hand(model: PreTrainedModel, family: str, file: dict[str, Tensor]) -> None:
    for layer in range(LAYERS):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in range(EXPERTS):
            for projection, matrix in expert_matrices(family, file, layer, expert).items():
                packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
                stack = experts.packed(projection)
                assert torch.equal(stack.packed[expert].flatten(), packed.flatten())
                assert torch.equal(stack.absmax[expert], state.absmax)
                assert torch.equal(stack.nested_absmax[expert], state.state2.absmax)
                assert torch.equal(stack.offset[expert], state.offset)


def assert_rest_is_untouched(model: PreTrainedModel, file: dict[str, Tensor], attention: str) -> None:
    """Router, norms, embeddings and head as in the file; attention too, or its 4-bit bits by hand."""
    loaded = dict(model.named_parameters())
    for name, tensor in file.items():
        if ".experts." in name:
            continue
        parameter = loaded[name.replace(".block_sparse_moe.", ".mlp.")]
        if "_proj." in name and attention == "nf4":
            packed, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            assert torch.equal(parameter.data, packed)
            assert torch.equal(parameter.quant_state.absmax, state.absmax)
            assert torch.equal(parameter.quant_state.state2.absmax, state.state2.absmax)
            assert torch.equal(parameter.quant_state.offset, state.offset)
        else:
            assert torch.equal(parameter, tensor), name
            assert parameter.dtype == tensor.dtype


# ---- quantizing while loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_here_have_the_layout_of_the_hub(tmp_path: Path, family: str) -> None:
    """What the tests below call the hub's layout is one matrix a projection and expert, by the hub's names."""
    tiny_model(family).save_pretrained(tmp_path)
    experts, *projections = HUB_NAMES[family]
    found = {name for name in tensors_of(tmp_path) if ".experts." in name}
    assert found == {
        f"model.layers.{layer}.{experts}.{expert}.{projection}.weight"
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for projection in projections
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["single file", "sharded", "fused"])
def test_every_layout_and_dtype_gives_the_bits_of_quantizing_by_hand(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    plain = tiny_model("mixtral", dtype=dtype)
    plain.save_pretrained(tmp_path / "hub", max_shard_size="200KB" if layout == "sharded" else "5GB")
    folder = tmp_path / "hub"
    file = tensors_of(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 4) == (layout == "sharded")
    if layout == "fused":
        folder = tmp_path / "fused"
        save_fused(plain, folder)
        assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(folder)
    model = load(folder)
    assert model.dtype == dtype
    assert_experts_equal_by_hand(model, "mixtral", file)
    assert_rest_is_untouched(model, file, "nf4")


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_bits_of_quantizing_by_hand(tmp_path: Path, family: str, attention: str) -> None:
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, attention)
    file = tensors_of(tmp_path)
    assert_experts_equal_by_hand(model, family, file)
    assert_rest_is_untouched(model, file, attention)
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == (4 * LAYERS if attention == "nf4" else 0)


@pytest.mark.parametrize("load_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_the_weights_in_the_load_dtype(tmp_path: Path, load_dtype: torch.dtype) -> None:
    """transformers casts to the load dtype before it quantizes. A bf16 checkpoint, as the hub's are, gives the same
    bits in float32 and bfloat16 because both hold its values exactly."""
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    file = tensors_of(tmp_path)
    model = load(tmp_path, dtype=load_dtype)
    cast = {name: tensor.to(load_dtype) for name, tensor in file.items()}
    assert_experts_equal_by_hand(model, "mixtral", cast)
    assert_rest_is_untouched(model, cast, "nf4")
    if load_dtype != torch.float16:
        assert_experts_equal_by_hand(model, "mixtral", file)


@pytest.mark.parametrize("attention", STORAGES)
def test_what_may_train_after_loading(tmp_path: Path, attention: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", attention)
    model.save_pretrained(tmp_path / "quantized")
    for loaded in (model, reload(tmp_path / "quantized")):
        for name, parameter in loaded.named_parameters():
            frozen = ".experts." in name or (attention == "nf4" and "_proj." in name)
            assert parameter.requires_grad == (not frozen), name
        assert loaded.is_loaded_in_4bit == (attention == "nf4")
        assert loaded.quantization_method == QUANT_METHOD


def test_upstream_reserves_the_quantized_size(tmp_path: Path) -> None:
    """Before loading, transformers reserves device memory by `param_element_size`: not 16 bits a weight."""
    plain = tiny_model("mixtral", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16)
    quantizer = model.hf_quantizer
    quantizer.preprocess_model(model=skeleton, dtype=torch.bfloat16)
    reserved = sum(p.numel() * quantizer.param_element_size(skeleton, n, p) for n, p in skeleton.named_parameters())
    # 2% more in truth: the code books and descriptions of 4-bit attention weigh in a model as small as this.
    assert reserved == pytest.approx(sum(t.nbytes for t in model.state_dict().values()), rel=0.03)
    assert reserved < 0.35 * sum(p.nbytes for p in plain.parameters())
    assert quantizer.update_device_map(None) == {"": "cpu"}
    assert quantizer.update_device_map({"": 3}) == {"": 3}


# ---- saving and loading again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("attention", STORAGES)
def test_round_trip_is_exact_and_quantizes_nothing(
    tmp_path: Path, attention: str, sharded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("mixtral", dtype=dtype).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", attention)
    size = "100KB" if sharded else "5GB"
    model.save_pretrained(tmp_path / "once", max_shard_size=size)
    assert (len(list((tmp_path / "once").glob("*.safetensors"))) > 2) == sharded
    expected, expected_logits = bits(model), logits(model)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr("finetune.kernels.nf4.quantize_codes", refuse)
    again = reload(tmp_path / "once")
    assert again.dtype == dtype
    assert again.config.quantization_config.attention == attention
    assert_same_bits(bits(again), expected)
    assert torch.equal(logits(again), expected_logits)

    again.save_pretrained(tmp_path / "twice", max_shard_size=size)
    for file in (tmp_path / "once").iterdir():
        twice = tmp_path / "twice" / file.name
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(twice.read_bytes()).digest(), file.name


@pytest.mark.parametrize(("family", "tied"), [("qwen3_moe", True), ("olmoe", False)])
def test_round_trip_of_the_other_families(tmp_path: Path, family: str, tied: bool) -> None:
    tiny_model(family, dtype=torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    model.save_pretrained(tmp_path / "quantized")
    again = reload(tmp_path / "quantized")
    assert_same_bits(bits(again), bits(model))
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_the_saved_folder_says_what_it_is(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", "16bit").save_pretrained(tmp_path / "quantized")
    saved = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert saved == {"quant_method": "moe_4bit", "attention": "16bit", "format_version": 1}
    names = {name for name in tensors_of(tmp_path / "quantized") if ".layers.0.mlp.experts." in name}
    assert names == {
        f"model.layers.0.mlp.experts.{projection}_{field}"
        for projection in ("gate_up_proj", "down_proj")
        for field in ("packed", "absmax", "nested_absmax", "offset")
    }


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_quantized_folder_in_another_dtype_keeps_its_bits(
    tmp_path: Path, attention: str, saved: torch.dtype, loaded: torch.dtype
) -> None:
    """The compute dtype of a saved folder is free: scales stay float32, nibbles stay nibbles, the rest is cast."""
    tiny_model("mixtral", dtype=saved).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", attention)
    model.save_pretrained(tmp_path / "quantized")
    again = reload(tmp_path / "quantized", dtype=loaded)
    assert again.dtype == loaded
    found = again.state_dict()
    for name, tensor in model.state_dict().items():
        if "bitsandbytes__nf4" in name:
            continue  # describes the dtype that products run in, which is the other one now
        kept = ".experts." in name or (attention == "nf4" and "_proj." in name)
        assert torch.equal(found[name], tensor if kept else tensor.to(loaded)), name
        assert found[name].dtype == (tensor.dtype if kept else loaded)


def test_a_folder_trains_like_the_checkpoint_it_was_made_from(tmp_path: Path) -> None:
    """Quantized in bfloat16 and saved, or quantized while loading in float32: equal gradients, although bitsandbytes'
    backward rounds weights to a dtype of its own memory."""
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain").save_pretrained(tmp_path / "quantized")
    direct = add_lora(load(tmp_path / "plain", dtype=torch.float32))
    saved = add_lora(reload(tmp_path / "quantized", dtype=torch.float32))
    copy_lora(direct, saved)
    assert_same_bits(lora_gradients(saved), lora_gradients(direct))


@pytest.mark.parametrize("attention", STORAGES)
def test_casting_the_model_keeps_the_scales(tmp_path: Path, attention: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    model = load(tmp_path, attention)
    before = bits(model)
    model = model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_a_cpu_with_avx512_bf16_does_not_repack_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes would repack the 4-bit weights in place in eval mode there, and round their scales."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    model.save_pretrained(tmp_path / "quantized")
    for loaded in (model, reload(tmp_path / "quantized")):
        before = bits(loaded)
        logits(loaded.eval())
        assert_same_bits(bits(loaded), before)
