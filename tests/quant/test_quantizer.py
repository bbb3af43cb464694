"""Loading, saving and running models whose experts are 4-bit, for every supported family and layout.

Truth: bitsandbytes' `quantize_4bit` of each expert's matrix as the checkpoint file holds it, and plain transformers
models with the dequantized weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import finetune
from finetune.errors import ModelError
from finetune.quant import Moe4bitConfig, Nf4Experts
from finetune.quant.config import QUANT_METHOD
from tests.models import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    VOCAB,
    dequantized_twin,
    save_fused,
    tiny_config,
    tiny_model,
    tokens,
)

# What the hub calls the projections of an expert: gate, up, down.
HUB_NAMES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
STORAGES = ("nf4", "16bit")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(folder: Path, attention: str = "nf4", **kwargs: Any) -> PreTrainedModel:
    """Quantizes while loading, and insists that every tensor found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Moe4bitConfig(attention=attention), output_loading_info=True, **kwargs
    )
    assert not any(info.values()), info
    return model


def reload(folder: Path, **kwargs: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


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
                stack = experts.stack(projection)
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


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


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
    small = 4 * LAYERS * (16 * 4 + 256 * 4 + 64)  # code books and the like of the attention
    assert reserved == pytest.approx(sum(t.nbytes for t in model.state_dict().values()), abs=small)
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

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", refuse)
    again = reload(tmp_path / "once")
    assert again.dtype == dtype
    assert again.config.quantization_config.attention == attention
    assert_same_bits(bits(again), expected)
    assert torch.equal(logits(again), expected_logits)

    again.save_pretrained(tmp_path / "twice", max_shard_size=size)
    for file in (tmp_path / "once").iterdir():
        twice = tmp_path / "twice" / file.name
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(twice.read_bytes()).digest(), file.name


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_round_trip_of_the_other_families(tmp_path: Path, family: str) -> None:
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    model.save_pretrained(tmp_path / "quantized")
    again = reload(tmp_path / "quantized")
    assert_same_bits(bits(again), bits(model))
    assert torch.equal(logits(again), logits(model))


def test_tied_embeddings_round_trip(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    model.save_pretrained(tmp_path / "quantized")
    again = reload(tmp_path / "quantized")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


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


def test_a_quantized_folder_in_another_dtype_keeps_its_bits(tmp_path: Path) -> None:
    """The compute dtype of a saved folder is free: scales stay float32, nibbles stay nibbles."""
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    model.save_pretrained(tmp_path / "quantized")
    wide = reload(tmp_path / "quantized", dtype=torch.float32)
    assert wide.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        found = wide.state_dict()[name]
        if tensor.dtype == torch.bfloat16:
            assert found.dtype == torch.float32
            assert torch.equal(found, tensor.float())
        elif "bitsandbytes__nf4" not in name:
            assert torch.equal(found, tensor), name


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


# ---- running ------------------------------------------------------------------------------------------------------


# Relative error of the logits against the twin with the dequantized weights, float32: measured 0.0 (the same products
# in the same order on this machine); another BLAS may order its sums otherwise. The quantization itself moves them by
# 0.15 (attention 16-bit) to 0.38.
LOGITS_LIMIT = 1e-5


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"norm_topk_prob": False}),
        ("olmoe", {"clip_qkv": 0.5}),
    ],
    ids=str,
)
def test_logits_equal_the_dequantized_twin(
    tmp_path: Path, family: str, overrides: dict[str, Any], attention: str
) -> None:
    plain = tiny_model(family, **overrides)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, attention)
    expected = logits(dequantized_twin(model))
    assert relative_error(logits(model), expected) < LOGITS_LIMIT
    assert relative_error(logits(plain), expected) > 0.1, "the limit would not notice unquantized experts"
    if "norm_topk_prob" in overrides:
        model.config.norm_topk_prob = not model.config.norm_topk_prob
        assert relative_error(logits(dequantized_twin(model)), expected) > 0.01, "the router's normalization is unseen"


def add_lora(model: PreTrainedModel) -> PeftModel:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=QKVO, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def lora_gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in grads)
    return grads


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_equal_the_dequantized_twin(tmp_path: Path, family: str, attention: str) -> None:
    """Every LoRA gradient, the first layer's included, which come back through two layers of frozen experts and
    through the routing weights. Measured in float32: at most 9e-7 relative."""
    tiny_model(family).save_pretrained(tmp_path)
    quantized = load(tmp_path, attention)
    twin = add_lora(dequantized_twin(quantized))
    model = add_lora(quantized)
    ours = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(ours[name].data)

    found, expected = lora_gradients(model), lora_gradients(twin)
    assert found.keys() == expected.keys()
    assert len(found) == LAYERS * len(QKVO) * 2
    for name, grad in expected.items():
        assert grad.norm() > 0
        assert relative_error(found[name], grad) < 1e-5, name

    # The routing weights carry a part of them: without it, the first layer's gradients are clearly others.
    for layer in twin.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1].detach(), out[2]))
    detached = lora_gradients(twin)
    first = [name for name in expected if ".layers.0." in name]
    assert all(relative_error(detached[name], expected[name]) > 0.01 for name in first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, use_reentrant: bool) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    model = add_lora(load(tmp_path))
    expected = lora_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_bits(lora_gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(tmp_path: Path, family: str) -> None:
    """Greedy tokens equal those of the twin, with the cache and without."""
    tiny_model(family).save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    prompt = tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert found.shape == (2, 13)
    for use_cache in (True, False):
        expected = dequantized_twin(model).generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **settings
        )
        assert torch.equal(found, expected)


# ---- refusing -----------------------------------------------------------------------------------------------------


def save_random(config: PreTrainedConfig, folder: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


TINY = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
UNSUPPORTED = {
    "llama": LlamaConfig(**TINY, **HEADS),
    "gpt_oss": GptOssConfig(**TINY, **HEADS, num_local_experts=2, num_experts_per_tok=1),
    "deepseek_v3": DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, **HEADS,
        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    save_random(UNSUPPORTED[model_type], tmp_path)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert f"model type '{model_type}' is not a mixture of experts that this toolkit quantizes" in message
    assert "allowed: mixtral, qwen3_moe, olmoe" in message
    assert "fix: use a Mixtral, Qwen3-MoE or OLMoE checkpoint" in message


REFUSED = {
    "hidden": (
        "mixtral",
        {"hidden_size": 96, "head_dim": 64},
        ["input dimension 96 of gate_up_proj", "multiple of 64"],
    ),
    "intermediate": ("mixtral", {"intermediate_size": 100}, ["input dimension 100 of down_proj"]),
    "attention width": ("mixtral", {"head_dim": 40}, ["input dimension 160 of o_proj"]),
    "activation": ("olmoe", {"hidden_act": "gelu"}, ["activation 'gelu'", "allowed: silu", "hidden_act"]),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, ["mixes dense and sparse layers (mlp_only_layers=[1]"]),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "every layer holds experts"]),
    "biases": ("qwen3_moe", {"attention_bias": True}, ["biases in its attention", "attention_bias"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    family, overrides, texts = REFUSED[case]
    save_random(tiny_config(family, **overrides), tmp_path)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    for text in texts:
        assert text in str(caught.value)


def edit(folder: Path, keep: str, replace: dict[str, Tensor] | None = None) -> None:
    """Rewrites a single-file checkpoint without the tensors whose names do not match `keep`."""
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if re.search(keep, name)}
    save_file({**tensors, **(replace or {})}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_with_too_few_experts_is_refused(tmp_path: Path) -> None:
    """The survivors would be stacked and every expert after the gap would take its neighbour's place."""
    tiny_model("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, r"^(?!.*layers\.1.*experts\.2\.)")
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "the checkpoint holds 3 of 4 experts" in message
    assert "where: model.layers.1.mlp.experts.gate_up_proj and 1 more" in message
    assert f"allowed: [{EXPERTS}, {2 * INTERMEDIATE}, {HIDDEN}] by config.json" in message
    assert "fix: download the checkpoint again" in message


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "block_sparse_moe.experts.{}.w2.weight"])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    wrong = {f"model.layers.0.{name.format(expert)}": torch.zeros(64, 64) for expert in range(EXPERTS)}
    edit(tmp_path, ".", wrong)
    with pytest.raises(ModelError, match="a weight of the checkpoint has the shape") as caught:
        load(tmp_path)
    assert "where: model.layers.0." in str(caught.value)
    assert "by config.json" in str(caught.value)


# ---- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", STORAGES)
def test_config_survives_copies_pickles_and_dicts(attention: str) -> None:
    config = Moe4bitConfig(attention=attention)
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        Moe4bitConfig.from_dict(config.to_dict()),
        Moe4bitConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert other == config
        assert other.to_dict() == config.to_dict()
    assert Moe4bitConfig() == Moe4bitConfig(attention="nf4") != Moe4bitConfig(attention="16bit")
    assert finetune.Moe4bitConfig is Moe4bitConfig


def test_config_errors() -> None:
    with pytest.raises(ModelError) as caught:
        Moe4bitConfig(attention="int8")
    assert "attention storage 'int8' does not exist" in str(caught.value)
    assert "allowed: nf4 or 16bit" in str(caught.value)
    assert "fix: use" in str(caught.value)

    with pytest.raises(ModelError) as caught:
        Moe4bitConfig(format_version=2)
    assert "saved in format 2 of moe_4bit" in str(caught.value)
    assert "where: config.json: quantization_config.format_version" in str(caught.value)
    assert "upgrade moe-qlora" in str(caught.value)

    with pytest.raises(ModelError) as caught:
        Moe4bitConfig(load_in_4bit=True, bits=4)
    assert "unknown keys ['bits', 'load_in_4bit']" in str(caught.value)
    assert "allowed: attention, format_version" in str(caught.value)


def test_a_folder_of_a_later_format_is_refused(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain").save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["format_version"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="saved in format 7"):
        reload(tmp_path / "quantized")


def test_the_module_prints_its_sizes() -> None:
    assert str(Nf4Experts(4, 128, 192)) == "Nf4Experts(experts=4, hidden=128, intermediate=192, nf4)"
