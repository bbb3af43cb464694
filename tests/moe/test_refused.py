"""Models and checkpoints that cannot be quantized, each refused in one message; and the quantization config itself."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
)

import finetune
from finetune.errors import ModelError
from finetune.moe import Moe4bitConfig
from finetune.moe.experts import QuantizedExperts
from tests.models import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    VOCAB,
    tiny_config,
    tiny_model,
)
from tests.moe.loading import (
    STORAGES,
    load,
    reload,
    tensors_of,
)
from tests.running import refused


def save_random(config: PreTrainedConfig, folder: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


TINY = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
UNSUPPORTED = {
    "llama": LlamaConfig(**TINY, **HEADS),
    "gpt_oss": GptOssConfig(**TINY, **HEADS, num_local_experts=2, num_experts_per_tok=1),
}


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
    "activation": ("olmoe", {"hidden_act": "gelu"}, ["`hidden_act` cannot be 'gelu'", "allowed: hidden_act: 'silu'"]),
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


@pytest.mark.parametrize("attention", STORAGES)
def test_missing_weights_are_reported(tmp_path: Path, attention: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, r"^(?!.*layers\.0.*(q_proj|w2))")
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Moe4bitConfig(attention=attention), output_loading_info=True
    )
    assert info["missing_keys"] == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"}


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention": "int8"}, ("attention storage 'int8' does not exist", "allowed: nf4, 16bit", "fix: use")),
        ({"experts": "hqq4"}, ("expert storage 'hqq4' does not exist", "allowed: nf4, hqq3, hqq2", "fix: use")),
        (
            {"experts": "hqq2", "format_version": 1},
            ("saved in format 1 of moe_4bit", "allowed: 2 for experts in hqq2", "upgrade moe-qlora"),
        ),
        (
            {"format_version": 2},
            (
                "saved in format 2 of moe_4bit",
                "where: config.json: quantization_config.format_version",
                "allowed: 1 for experts in nf4",
            ),
        ),
        (
            {"experts": "hqq2", "format_version": 3},
            ("saved in format 3 of moe_4bit", "allowed: 2 for experts in hqq2"),
        ),
        (
            {"load_in_4bit": True, "bits": 4},
            ("unknown keys ['bits', 'load_in_4bit']", "allowed: attention, experts, format_version"),
        ),
    ],
)
def test_configs_that_cannot_be(arguments: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        Moe4bitConfig(**arguments)
    for text in says:
        assert text in str(caught.value)


def test_a_folder_of_a_later_format_is_refused(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain").save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["format_version"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="saved in format 7"):
        reload(tmp_path / "quantized")


def test_a_saved_layer_without_its_nested_scales_is_refused(tmp_path: Path) -> None:
    """bitsandbytes would take the scales' 8-bit codes for the scales."""
    tiny_model("mixtral").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", attention="nf4").save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight.nested_absmax"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weight is missing") as caught:
        reload(tmp_path / "quantized")
    assert "where: model.layers.1.self_attn.k_proj.weight.nested_absmax" in str(caught.value)


def test_the_module_prints_its_sizes() -> None:
    assert str(QuantizedExperts(4, 128, 192)) == "QuantizedExperts(experts=4, hidden=128, intermediate=192, nf4)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.1.mlp.experts.gate_up_proj of expert 2"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_weight_that_is_no_number_is_named_with_its_file(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, name: str, said: str
) -> None:
    """By everything that loads, and by merges, which stream."""
    base = tmp_path / "base"
    shutil.copytree(small_mixtral, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[33] = float("inf" if "norm" in name else "nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    says = (f"infinite or no number (NaN): {said}", f"model.safetensors: {name}")
    refused(tmp_path, "quantize", base, "--output", tmp_path / "out", "--device", "cpu", says=says)
    if "gate" not in name or "experts" in name:  # a router is another base's first
        args = ("merge", saved_adapter, "--base", base, "--output", tmp_path / "out", "--format")
        for format in ("nf4", "bf16"):
            refused(tmp_path, *args, format, says=says)
