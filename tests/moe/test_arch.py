"""The arithmetic of `MoeArch` against published sizes and against transformers' own models, parameter by parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

from finetune.errors import ModelError
from finetune.moe.arch import (
    ATTENTION_PROJECTIONS,
    ROUTER,
    SUPPORTED_MODEL_TYPES,
    MoeArch,
    experts_path,
    is_router,
    role_of,
    router_path,
)
from tests.models import EXPERTS, FAMILIES, LAYERS, tiny_config

# config.json of mistralai/Mixtral-8x7B-v0.1, as the hub has it.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


def message(config: dict[str, Any], where: str = "config.json") -> str:
    with pytest.raises(ModelError) as caught:
        MoeArch.from_config(config, where=where)
    return str(caught.value)


def test_mixtral_8x7b() -> None:
    """46.7 B parameters, of which 45.1 B in experts."""
    arch = MoeArch.from_config(MIXTRAL_8X7B)
    assert arch.total_params == 46_702_792_704
    assert arch.expert_params == 32 * 8 * 3 * 4096 * 14336 == 45_097_156_608
    assert arch.attention_params == 32 * 41_943_040
    assert arch.router_params == 32 * 8 * 4096
    assert arch.norm_params == 65 * 4096
    assert arch.embedding_params == 2 * 32000 * 4096
    assert (arch.head_dim, arch.qk_norm, arch.tied) == (128, 0, False)
    assert arch.expert_shapes() == {"gate_up_proj": (28672, 4096), "down_proj": (4096, 14336)}


def test_lora_of_the_classic_command() -> None:
    arch = MoeArch.from_config(MIXTRAL_8X7B)
    assert arch.lora_params(16) == 13_631_488
    assert arch.lora_params(64) == 4 * 13_631_488
    assert arch.lora_params(16, ("q_proj", "v_proj")) == 32 * 16 * ((4096 + 4096) + (4096 + 1024))
    assert arch.lora_params(16, dora=True) == 13_631_488 + 32 * (4096 + 1024 + 1024 + 4096)


def test_non_moe_of_mixtral_8x7b() -> None:
    arch = MoeArch.from_config(MIXTRAL_8X7B)
    assert arch.non_moe_params() == 46_702_792_704 - 45_097_156_608 - 32 * 8 * 4096
    assert arch.non_moe_params(router=True) == 46_702_792_704 - 45_097_156_608


def test_published_sizes_of_the_other_families() -> None:
    """Qwen3-30B-A3B and OLMoE-1B-7B."""
    qwen = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_local_experts=128, num_experts_per_tok=8, vocab_size=151936,
    )  # fmt: skip
    arch = MoeArch.from_config(qwen.to_dict())
    assert round(arch.total_params / 1e9, 2) == 30.53
    arch = MoeArch.from_config(OlmoeConfig(intermediate_size=1024).to_dict())
    assert round(arch.total_params / 1e9, 2) == 6.92


VARIANTS = [
    (family, {"tie_word_embeddings": tied, **more})
    for family in FAMILIES
    for tied in (False, True)
    for more in ({}, {"num_key_value_heads": 4, "num_experts_per_tok": 1, "num_hidden_layers": 3})
]


def build(family: str, **overrides: Any) -> tuple[nn.Module, MoeArch]:
    config = tiny_config(family, **overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, MoeArch.from_config(config.to_dict())


def count(model: nn.Module, role: str) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if role_of(name) == role)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=str)
def test_counts_equal_those_of_the_real_model(family: str, overrides: dict[str, Any]) -> None:
    model, arch = build(family, **overrides)
    assert arch.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert arch.expert_params == count(model, "experts")
    assert arch.attention_params == count(model, "attention")
    assert arch.router_params == count(model, "router")
    assert arch.norm_params == count(model, "norm")
    assert arch.embedding_params == count(model, "embedding") + count(model, "head")
    assert (count(model, "head") == 0) == arch.tied == overrides["tie_word_embeddings"]
    assert count(model, "other") == count(model, "adapter") == 0
    trained = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
    assert arch.non_moe_params(router=True) == trained
    assert arch.non_moe_params() == trained - count(model, "router")


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_paths_are_those_of_the_real_model(family: str) -> None:
    model, arch = build(family)
    assert (arch.layers, arch.experts) == (LAYERS, EXPERTS)
    for layer in range(arch.layers):
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        for name, shape in arch.attention_shapes().items():
            assert attention.get_submodule(name).weight.shape == shape
        experts = model.get_submodule(experts_path(layer))
        for name, shape in arch.expert_shapes().items():
            assert experts.get_parameter(name).shape == (arch.experts, *shape)
        assert model.get_submodule(router_path(layer)).weight.shape == (arch.experts, arch.hidden)


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, ("q_proj",), ("k_proj", "o_proj")], ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_count_equals_pefts(family: str, targets: tuple[str, ...], dora: bool, router: bool) -> None:
    config = tiny_config(family)
    arch = MoeArch.from_config(config.to_dict())
    trained = [ROUTER] if router else None
    settings = LoraConfig(r=8, target_modules=list(targets), use_dora=dora, modules_to_save=trained)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    expected = arch.lora_params(8, targets, dora=dora, router=router)
    assert expected == model.get_nb_trainable_parameters()[0] == count(model, "adapter")
    assert count(model, "router") == arch.router_params


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_reads_like_the_one_in_memory(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert MoeArch.from_config(saved) == MoeArch.from_config(config.to_dict())


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_qwen_configs_may_carry_either_name_of_the_number_of_experts(key: str) -> None:
    config = tiny_config("qwen3_moe").to_dict()
    for name in ("num_experts", "num_local_experts"):
        config.pop(name, None)
    assert MoeArch.from_config({**config, key: 6}).experts == 6


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v3", "mistral", None])
def test_other_types_are_refused_with_the_allowed_ones(model_type: str | None) -> None:
    text = message({**MIXTRAL_8X7B, "model_type": model_type}, where="some/folder")
    assert text.startswith(f"model type {model_type!r} is not a mixture of experts that this toolkit quantizes\n")
    assert "where: some/folder" in text
    assert f"allowed: {', '.join(SUPPORTED_MODEL_TYPES)}" in text
    assert SUPPORTED_MODEL_TYPES == ("mixtral", "qwen3_moe", "olmoe")
    assert "fix: use a Mixtral, Qwen3-MoE or OLMoE checkpoint" in text


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        ({"mlp_only_layers": [1]}, "mlp_only_layers=[1], decoder_sparse_step=1"),
        ({"decoder_sparse_step": 2}, "mlp_only_layers=[], decoder_sparse_step=2"),
    ],
)
def test_dense_layers_are_refused(dense: dict[str, Any], said: str) -> None:
    text = message({**tiny_config("qwen3_moe").to_dict(), **dense})
    assert text.startswith(f"this qwen3_moe mixes dense and sparse layers ({said})\n")
    assert "allowed: models whose every layer holds experts" in text


def test_attention_biases_are_refused() -> None:
    text = message({**tiny_config("olmoe").to_dict(), "attention_bias": True})
    assert text.startswith("this olmoe has biases in its attention projections\n")
    assert "where: config.json: attention_bias" in text


def test_missing_keys_are_named() -> None:
    config = {key: value for key, value in MIXTRAL_8X7B.items() if key not in ("vocab_size", "num_local_experts")}
    text = message(config)
    assert text.startswith("the config lacks vocab_size, num_local_experts\n")
    assert "fix: use the config.json that belongs to the checkpoint" in text


# ---- names --------------------------------------------------------------------------------------------------------


def test_roles() -> None:
    layer = "model.layers.11."
    peft = "base_model.model.model.layers.11.self_attn.q_proj."
    assert {
        name: role_of(name)
        for name in (
            layer + "mlp.experts.gate_up_proj",
            layer + "mlp.experts.down_proj_nested_absmax",
            layer + "mlp.gate.weight",
            layer + "mlp.gate_proj.weight",
            layer + "self_attn.o_proj.weight",
            layer + "self_attn.q_norm.weight",
            layer + "post_attention_layernorm.weight",
            "model.norm.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.rotary_emb.inv_freq",
            peft + "lora_A.default.weight",
            peft + "lora_magnitude_vector.default.weight",
            peft + "base_layer.weight",
            "base_model.model." + layer + "mlp.gate.original_module.weight",
            "base_model.model." + layer + "mlp.gate.modules_to_save.default.weight",
        )
    } == {
        layer + "mlp.experts.gate_up_proj": "experts",
        layer + "mlp.experts.down_proj_nested_absmax": "experts",
        layer + "mlp.gate.weight": "router",
        layer + "mlp.gate_proj.weight": "other",
        layer + "self_attn.o_proj.weight": "attention",
        layer + "self_attn.q_norm.weight": "norm",
        layer + "post_attention_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.rotary_emb.inv_freq": "other",
        peft + "lora_A.default.weight": "adapter",
        peft + "lora_magnitude_vector.default.weight": "adapter",
        peft + "base_layer.weight": "attention",
        "base_model.model." + layer + "mlp.gate.original_module.weight": "router",
        "base_model.model." + layer + "mlp.gate.modules_to_save.default.weight": "adapter",
    }
    assert is_router(layer + "mlp.gate.weight")
    assert is_router("base_model.model." + layer + "mlp.gate.modules_to_save.default.weight")
    assert not is_router(layer + "mlp.gate_proj.weight")


def test_preflight_needs_no_torch() -> None:
    code = "import sys, finetune.moe.arch, finetune.errors, finetune.checkpoint; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
