"""Values of the wrong type in every file of a model, an adapter or non-MoE weights: the key, what was found, what is
allowed, and how to fix it, before anything is loaded.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapter.adapter import Adapter
from finetune.adapter.lora import read_saved
from finetune.adapter.non_moe import load_non_moe, save_non_moe, unfreeze_non_moe
from finetune.errors import FinetuneError
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import check_base, load_base, load_tokenizer, read_config
from finetune.moe.skeleton import build_skeleton


def edited(file: Path, **changes: object) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value != "<absent>"}
    file.write_text(json.dumps(kept), encoding="utf-8")


def message(act: Callable[[], object]) -> str:
    with pytest.raises(FinetuneError) as caught:
        act()
    return str(caught.value)


@pytest.fixture
def model(small_mixtral: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_mixtral, tmp_path / "model")


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok", "vocab_size")
NUMBERS += ("intermediate_size", "num_local_experts", "max_position_embeddings")


@pytest.mark.parametrize("value", ["64", 1.5, True, [64], {}, -1, 0, 10**20], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_sizes_in_config_json(small_mixtral: Path, key: str, value: Any) -> None:
    from finetune.moe.arch import MoeArch

    config = json.loads((small_mixtral / "config.json").read_text())
    text = message(lambda: MoeArch.from_config({**config, key: value}, where="here"))
    assert text.startswith(f"config.json does not fit: `{key}` cannot be ")
    assert f"allowed: {key}: " in text
    assert "where: here" in text
    assert "fix: use the config.json that belongs to the checkpoint" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_position_embeddings": "<absent>"}, ("the config lacks max_position_embeddings",)),
        ({"quantization_config": True}, ("`quantization_config` cannot be true", "a mapping")),
        ({"tie_word_embeddings": "yes"}, ("`tie_word_embeddings` cannot be 'yes'", "true or false")),
        ({"rope_parameters": {"rope_theta": "x"}}, ("`rope_parameters.rope_theta` cannot be 'x'", "a number")),
        ({"rope_parameters": {"rope_type": "spiral"}}, ("config.json cannot be used: ", "spiral")),
        ({"dtype": "bf16"}, ("`dtype` cannot be 'bf16'", "'bfloat16'")),
        ({"hidden_act": ""}, ("`hidden_act` cannot be ''", "'silu'")),
        ({"num_key_value_heads": 3}, ("config.json contradicts itself: num_attention_heads is 4, and num_key",)),
        ({"num_experts_per_tok": 5}, ("contradicts itself: num_experts_per_tok is 5, and there are 4 experts",)),
        ({"head_dim": 17}, ("`head_dim` cannot be 17", "multiple of 2")),
        ({"router_aux_loss_coef": 1}, ("config.json cannot be used: ", "expected float, got int")),
        ({"id2label": 7}, ("config.json cannot be used: ",)),
        ({"num_hidden_layers": 3}, ("weights are missing from the checkpoint", "model.layers.2.")),
        (
            {"intermediate_size": 64},
            ("does not belong to these weights: 24 of them", "w1.weight is [128, 64]"),
        ),
        ({"vocab_size": 32064}, ("does not belong to these weights: 1 of them", "the config says [32064, 64]")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_values_in_config_json(model: Path, changes: dict[str, object], says: tuple[str, ...]) -> None:
    edited(model / "config.json", **changes)
    text = message(lambda: check_base(BaseSpec(str(model))))
    for words in says:
        assert words in text


def test_several_faults_are_one_message(model: Path) -> None:
    edited(model / "config.json", vocab_size=None, use_cache=0, head_dim="x", sliding_window=-5, hidden_size=[])
    text = message(lambda: read_config(str(model)))
    assert text.count(" cannot be ") == 3
    assert " and 2 more\n" in text


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("generation_config.json", {"pad_token_id": "x"}, "`pad_token_id` cannot be 'x'"),
        ("generation_config.json", {"eos_token_id": [1, "x"]}, "`eos_token_id[1]` cannot be 'x'"),
        ("generation_config.json", {"early_stopping": []}, "generation_config.json cannot be used: TypeError"),
        ("tokenizer_config.json", {"eos_token": 7}, "`eos_token` cannot be 7"),
        ("tokenizer_config.json", {"tokenizer_class": 1}, "`tokenizer_class` cannot be 1"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "tokenizer_config.json does not fit: "),
        ("tokenizer_config.json", {"auto_map": 0.5}, "`auto_map` cannot be 0.5"),
        ("tokenizer.json", {"model": []}, "`model` cannot be a list"),
        ("tokenizer.json", {"decoder": {"type": "Spiral"}}, "no tokenizer could be read: "),
        ("special_tokens_map.json", {"bos_token": []}, "`bos_token` cannot be a list"),
    ],
)
def test_values_in_the_other_files_of_a_model(model: Path, name: str, changes: dict[str, object], says: str) -> None:
    if not (model / name).exists():
        (model / name).write_text("{}")
    edited(model / name, **changes)

    def read() -> None:
        check_base(BaseSpec(str(model)))
        load_tokenizer(str(model))

    text = message(read)
    assert says in text
    assert "fix: " in text


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("base.json", {"path": None}, "`path` cannot be null"),
        ("base.json", {"path": ""}, "allowed: path: text that is not empty"),
        ("base.json", {"fingerprint": 7}, "`fingerprint` cannot be 7"),
        ("base.json", {"attention": "nf8"}, "allowed: attention: 'nf4' or '16bit'"),
        ("base.json", {"of_a_newer_release": 1}, "keys of a newer release need that release: update moe-qlora"),
        ("base.json", {"of_a_newer_release": 1}, "`of_a_newer_release` cannot be a key"),
        ("base.json", {"format": 2}, "base.json is of format 2, which this release of moe-qlora does not know"),
        ("base.json", {"format": 2}, "fix: update moe-qlora"),
        ("adapter_config.json", {"r": "4"}, "`r` cannot be '4'"),
        ("adapter_config.json", {"lora_alpha": None}, "`lora_alpha` cannot be null"),
        ("adapter_config.json", {"target_modules": {"a": 1}}, "allowed: target_modules: a list or text"),
        (
            "adapter_config.json",
            {"target_modules": "a"},
            "target_modules names 0 modules of this model",
        ),
        ("adapter_config.json", {"target_modules": "("}, "adapter_config.json cannot be used: "),
        ("adapter_config.json", {"target_modules": ["layers.0.self_attn.q_proj"]}, "does not fit this model"),
        (
            "adapter_config.json",
            {"arrow_config": 7},
            "the adapter is not LoRA of one rank on the attention: arrow_config is 7",
        ),
    ],
)
def test_values_in_the_files_of_an_adapter(adapter: Path, name: str, changes: dict[str, object], says: str) -> None:
    edited(adapter / name, **changes)

    def read() -> None:
        spec = Adapter.open(adapter).require_base()
        read_saved(build_skeleton(read_config(spec.path), spec.path), adapter)

    text = message(read)
    assert says in text
    assert "fix: " in text


def test_what_non_moe_weights_say_of_themselves(small_mixtral: Path, tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(small_mixtral), attention="16bit"), device="cpu")
    unfreeze_non_moe(base.model, base.arch)
    save_non_moe(base.model, tmp_path, base={"path": "x"})
    file = tmp_path / "non_moe.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    before = base.model.get_parameter("model.norm.weight").clone()
    for said, says in {
        "{": "does not say in valid JSON what it holds",
        "[]": "the whole cannot be a list",
        '{"format": 1}': "`base` is missing, `router` is missing",
        '{"format": 2, "base": {}, "router": false}': "`format` cannot be 2",
    }.items():
        header["__metadata__"]["non_moe"] = said
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        refusal = message(lambda: load_non_moe(base.model, tmp_path))
        assert says in refusal
        assert f"where: {file}" in refusal
    assert torch.equal(base.model.get_parameter("model.norm.weight"), before)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/hostname", "a/../../b.safetensors"])
def test_an_index_that_leaves_its_folder(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    text = message(lambda: check_base(BaseSpec(str(model))))
    assert text.startswith(f"model.safetensors.index.json names files outside of its folder: {name}\n")
    assert "allowed: names of files beside the index" in text


def test_an_index_without_what_transformers_wants(model: Path) -> None:
    (model / "model.safetensors").rename(model / "one.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    text = message(lambda: check_base(BaseSpec(str(model))))
    assert text.startswith("model.safetensors.index.json does not fit: `metadata` is missing\n")
