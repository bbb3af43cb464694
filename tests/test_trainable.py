"""What trains, by name and by number, and that it comes back from disk exactly.

Truth here: sets of parameter names written out, counts recomputed from tensors, stock `peft` loading our files onto a
stock transformers model, and bitsandbytes' own 4-bit layers under the adapter.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as Lora4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from finetune.adapter import non_moe
from finetune.adapter.files import kind_of
from finetune.adapter.lora import add_attention_lora, load_adapter, save_adapter
from finetune.adapter.masters import keep_fp32_masters, trainable_count
from finetune.adapter.non_moe import load_non_moe, save_non_moe, unfreeze_non_moe
from finetune.errors import AdapterError, FinetuneError, OutputError
from finetune.moe.arch import MoeArch, role_of

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TINY, intermediate_size=96, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, head_dim=32, moe_intermediate_size=96, num_experts=4)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**TINY, intermediate_size=96, num_experts=4)),
}
IDS = torch.arange(24).reshape(2, 12)


def build(family: str = "mixtral", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def mixtral(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**TINY, "intermediate_size": 96, "num_local_experts": 4, **changes}))


def arch_of(model: nn.Module) -> MoeArch:
    return MoeArch.from_config(model.config.to_dict())


def quantize_attention(model: PreTrainedModel) -> PreTrainedModel:
    """q/k/v/o as bitsandbytes NF4 layers, as the quantizer leaves them."""
    for path, linear in list(model.named_modules()):
        if role_of(f"{path}.weight") == "attention" and isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4", compress_statistics=True
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            ).to("cpu")
            model.set_submodule(path, layer)
    model.is_loaded_in_4bit = True
    return model


def randomize_lora(model: nn.Module) -> None:
    """LoRA starts as the identity; random B makes the adapter matter."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- attention LoRA -------------------------------------------------------------------------------------------


def test_the_classic_adapter_of_mixtral_8x7b_has_13_631_488_parameters():
    arch = MoeArch.from_config(MixtralConfig().to_dict())
    brute_force = 32 * 16 * sum(i + o for i, o in [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)])
    assert arch.lora_params(16) == brute_force == 13_631_488


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_attention_gets_lora(family: str, four_bit: bool):
    model = build(family)
    before = {name: p.clone() for name, p in model.named_parameters() if role_of(name) != "attention"}
    arch = arch_of(model)
    peft_model = add_attention_lora(quantize_attention(model) if four_bit else model, arch, r=4, alpha=8)
    assert trained_names(peft_model) == {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.default.weight"
        for layer in range(2)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for side in "AB"
    }
    assert trainable_count(peft_model) == arch.lora_params(4)
    layers = [m for m in peft_model.modules() if isinstance(m, Lora4bit)]
    assert len(layers) == (8 if four_bit else 0)
    # The rest is the same tensors, not converted, not moved.
    after = {name.removeprefix("base_model.model."): p for name, p in peft_model.named_parameters()}
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_adapter_starts_as_the_identity_and_its_first_layer_gets_a_gradient(four_bit: bool):
    model = quantize_attention(build()) if four_bit else build()
    base = logits(model)
    peft_model = add_attention_lora(model, arch_of(model), r=4)
    assert torch.equal(logits(peft_model), base)
    randomize_lora(peft_model)
    peft_model.train()
    peft_model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in peft_model.named_parameters() if "layers.0." in name and "lora_" in name}
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(p.grad is None for p in peft_model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("four_bit", [False, True])
def test_subset_dora_and_rank_stabilization_in_fp32_on_a_bf16_base(four_bit: bool):
    model = build().to(torch.bfloat16)
    arch = arch_of(model)
    model = quantize_attention(model) if four_bit else model
    peft_model = add_attention_lora(
        model, arch, r=4, alpha=8, target_modules=["v_proj", "q_proj", "v_proj"], use_dora=True, use_rslora=True
    )
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    # A and B of q (64 -> 64) and v (64 -> 32) of two layers, and one magnitude per output.
    assert sum(p.numel() for p in trained) == 2 * (4 * (64 + 64) + 4 * (64 + 32) + 64 + 32)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4**0.5
    assert torch.isfinite(logits(peft_model)).all()


@pytest.mark.parametrize(
    ("target", "reason", "fix"),
    [
        ("gate_up_proj", "experts are frozen in 4 bits", "remove it"),
        ("down_proj", "experts are frozen in 4 bits", "remove it"),
        ("w1", "experts are frozen in 4 bits", "remove it"),
        ("model.layers.0.mlp.experts", "experts are frozen in 4 bits", "remove it"),
        ("gate", "a router trains in full or not at all", "trainable.router: true"),
        ("router", "a router trains in full or not at all", "trainable.router: true"),
        ("lm_head", "embeddings and head do not take LoRA", "trainable.method: non_moe"),
        ("embed_tokens", "embeddings and head do not take LoRA", "trainable.method: non_moe"),
        (
            "all-linear",
            "attach to the router and to the experts",
            "write target_modules: [q_proj, k_proj, v_proj, o_proj]",
        ),
        ("q_porj", "no projection of that name", "did you mean 'q_proj'?"),
        ("banana", "no projection of that name", "remove it"),
    ],
)
def test_a_target_outside_the_attention_is_refused_with_the_reason(target: str, reason: str, fix: str):
    model = build()
    with pytest.raises(AdapterError) as caught:
        add_attention_lora(model, arch_of(model), target_modules=("q_proj", target))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"cannot train '{target}' with LoRA: ")
    assert reason in lines[0]
    assert lines[1] == "  where: trainable.lora.target_modules"
    assert lines[2] == "  allowed: q_proj, k_proj, v_proj, o_proj"
    assert fix in lines[3]
    assert not any("lora_" in name for name, _ in model.named_parameters()), "the model was touched"


def test_no_target_and_a_bare_string():
    model = build()
    with pytest.raises(AdapterError, match="nothing would train"):
        add_attention_lora(model, arch_of(model), target_modules=())
    peft_model = add_attention_lora(model, arch_of(model), target_modules="q_proj", r=2)
    assert trainable_count(peft_model) == 2 * 2 * (64 + 64)


@pytest.mark.parametrize("use_dora", [False, True])
def test_stock_peft_loads_the_saved_adapter_onto_the_stock_model(tmp_path: Path, use_dora: bool):
    build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft_model = add_attention_lora(model, arch_of(model), r=4, alpha=8, use_rslora=True, use_dora=use_dora)
    randomize_lora(peft_model)
    save_adapter(peft_model, tmp_path / "adapter")
    assert not [name for name in os.listdir(tmp_path / "adapter") if name.startswith(".")]

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(stock), logits(peft_model))
    assert not torch.equal(logits(stock), logits(build()))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == [f"self_attn.{name}_proj" for name in "koqv"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_cast_of_what_trains_is_undone_to_the_bit():
    model = build()
    peft_model = add_attention_lora(model, arch_of(model), r=4)
    before = {name: p.detach().clone() for name, p in peft_model.named_parameters()}
    with keep_fp32_masters(peft_model):
        for parameter in peft_model.parameters():  # what SFTTrainer.__init__ does to a quantized base
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.bfloat16}
    for name, parameter in peft_model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


# ---- loading an adapter ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter (r 4, q and v) of `build()` and the logits it gives."""
    folder = tmp_path_factory.mktemp("adapter")
    model = build()
    peft_model = add_attention_lora(model, arch_of(model), r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    randomize_lora(peft_model)
    save_adapter(peft_model, folder)
    return folder, logits(peft_model)


@pytest.fixture
def adapter(saved_adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved_adapter[0], tmp_path / "adapter"))


def set_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(model: PreTrainedModel, adapter: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, adapter)
    assert not any("lora_" in name for name, _ in model.named_parameters()), "the model was touched"
    return str(caught.value)


def test_an_adapter_comes_back(saved_adapter: tuple[Path, torch.Tensor]):
    folder, expected = saved_adapter
    frozen = load_adapter(build(), folder)
    assert torch.equal(logits(frozen), expected)
    assert trainable_count(frozen) == 0
    training = load_adapter(build(), folder, is_trainable=True)
    assert trainable_count(training) == arch_of(build()).lora_params(4, ("q_proj", "v_proj"))
    assert torch.isfinite(logits(load_adapter(quantize_attention(build()), folder))).all()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*self_attn\.(q_proj|v_proj)"])
def test_an_adapter_made_with_stock_peft_loads(tmp_path: Path, targets: list[str] | str):
    stock = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, use_dora=True))
    randomize_lora(stock)
    stock.save_pretrained(tmp_path)
    set_config(tmp_path, target_modules=targets)
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(stock))


def test_another_rank_than_the_config_says(adapter: Path):
    set_config(adapter, r=8)
    message = refusal(build(), adapter)
    assert message.startswith("the adapter does not fit this model at r=8: 8 tensors of another shape, 0 missing")
    assert "layers.0.self_attn.q_proj.lora_A.weight is [4, 64], this model needs [8, 64]" in message


def test_another_base_by_width_and_by_depth(adapter: Path):
    message = refusal(mixtral(hidden_size=128), adapter)
    assert "needs [4, 128]" in message
    set_config(adapter, base_model_name_or_path="the/other-base")
    message = refusal(mixtral(num_hidden_layers=3), adapter)
    assert "0 tensors of another shape, 4 missing, 0 unknown" in message
    assert "missing base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in message
    assert "fix: load it onto the base it was trained on (the/other-base)" in message
    message = refusal(mixtral(num_hidden_layers=1), adapter)
    assert "unknown base_model.model.model.layers.1.self_attn" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is ['mlp.experts.gate_up_proj']"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
        ({"r": None}, "`r` cannot be null"),
        ({"target_modules": ["q_proj", "w1"]}, "cannot train 'w1' with LoRA: the experts are frozen"),
        ({"target_modules": ["gate"]}, "cannot train 'gate' with LoRA: LoRA trains the attention only"),
    ],
)
def test_an_adapter_of_another_kind(adapter: Path, changes: dict[str, object], said: str):
    set_config(adapter, **changes)
    message = refusal(build(), adapter)
    assert said in message
    assert f"where: {adapter / 'adapter_config.json'}" in message
    assert "fix: " in message


def test_tensors_beyond_the_attention(adapter: Path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refusal(build(), adapter)
    assert "0 missing, 1 unknown" in message
    assert "unknown base_model.model.model.layers.0.mlp.experts.lora_A.weight" in message


def test_missing_and_damaged_adapter_files(adapter: Path):
    tensors = adapter / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-40])
    assert "truncated" in refusal(build(), adapter)
    tensors.write_bytes(b"\xff" * 200)
    assert "corrupt" in refusal(build(), adapter)
    tensors.unlink()
    message = refusal(build(), adapter)
    assert message.startswith("adapter_model.safetensors is missing")
    assert "holds: adapter_config.json" in message
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    assert "adapter_config.json is not valid JSON" in refusal(build(), adapter)
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in refusal(build(), adapter)
    message = refusal(build(), adapter / "nowhere")
    assert message.startswith("no adapter folder")
    assert "allowed: a folder with adapter_config.json and adapter_model.safetensors" in message


# ---- everything but the experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_experts_trains_as_fp32_masters(family: str, router: bool):
    model = build(family).to(torch.bfloat16)
    unfreeze_non_moe(model, arch_of(model), router=router)
    frozen = set(dict(model.named_parameters())) - trained_names(model)
    routers = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    experts = {f"model.layers.{layer}.mlp.experts.{name}_proj" for layer in range(2) for name in ("gate_up", "down")}
    assert frozen == (experts if router else experts | routers)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in experts else torch.float32), name
    assert trainable_count(model) == arch_of(model).non_moe_params(router=router)


def test_tied_embeddings_count_once_and_stay_tied():
    model = mixtral(tie_word_embeddings=True)
    unfreeze_non_moe(model, arch_of(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # embedding 96x64, attention of two layers, two norms a layer and the last one
    assert trainable_count(model) == 96 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32) + 5 * 64


def test_a_step_moves_all_of_it_and_no_expert():
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unfreeze_non_moe(model, arch_of(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained_names(model)


def test_a_quantized_attention_cannot_train():
    model = quantize_attention(build())
    with pytest.raises(FinetuneError) as caught:
        unfreeze_non_moe(model, arch_of(model))
    message = str(caught.value)
    assert "4-bit weights cannot train: 8 attention matrices are quantized" in message
    assert "found at model.layers.0.self_attn.q_proj.weight" in message
    assert "allowed: quantization.attention must be 16bit for trainable.method: non_moe" in message
    assert "fix: set quantization.attention: 16bit" in message


def tuned_model(*, router: bool = False, **changes: object) -> PreTrainedModel:
    """A bf16 base whose fp32 masters have moved by less than bf16 resolves."""
    model = mixtral(**changes).to(torch.bfloat16)
    unfreeze_non_moe(model, arch_of(model), router=router)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def autocast_logits(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return logits(model)


BASE = {"path": "some/base", "fingerprint": "abc"}


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_non_moe_comes_back_to_the_bit(tmp_path: Path, router: bool, tied: bool):
    tuned = tuned_model(router=router, tie_word_embeddings=tied)
    save_non_moe(tuned, tmp_path / "new" / "folder", base=BASE)
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["non_moe.json", "non_moe.safetensors"]
    about = json.loads((folder / "non_moe.json").read_text())
    assert about == {"format": 1, "base": BASE, "router": router, "parameters": trainable_count(tuned)}
    assert set(load_file(folder / "non_moe.safetensors")) == trained_names(tuned)

    fresh = mixtral(tie_word_embeddings=tied).to(torch.bfloat16)
    load_non_moe(fresh, folder, base=BASE)
    for (name, ours), (_, theirs) in zip(tuned.named_parameters(), fresh.named_parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert torch.equal(autocast_logits(fresh), autocast_logits(tuned))

    served = mixtral(tie_word_embeddings=tied).to(torch.bfloat16)
    load_non_moe(served, folder, dtype=torch.bfloat16)
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16}
    assert torch.equal(served.lm_head.weight, tuned.lm_head.weight.to(torch.bfloat16))
    assert torch.isfinite(logits(served)).all()


def test_training_after_loading_leaves_the_file_alone(tmp_path: Path):
    save_non_moe(tuned_model(), tmp_path, base=BASE)
    before = (tmp_path / "non_moe.safetensors").read_bytes()
    model = mixtral()
    load_non_moe(model, tmp_path)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert (tmp_path / "non_moe.safetensors").read_bytes() == before


def non_moe_refusal(model: PreTrainedModel, folder: Path, base: dict[str, str] | None = None) -> str:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError) as caught:
        load_non_moe(model, folder, base=base)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the model was touched"
    return str(caught.value)


def test_tuned_weights_of_another_base(tmp_path: Path):
    save_non_moe(tuned_model(), tmp_path, base=BASE)
    message = non_moe_refusal(mixtral(hidden_size=128), tmp_path)
    assert message.startswith("the tuned weights do not fit this model: 15 tensors of another shape, 0 missing")
    assert "model.embed_tokens.weight is [96, 64], this model needs [96, 128]" in message
    assert "fix: load it onto the base it was trained on ({'path': 'some/base', 'fingerprint': 'abc'})" in message
    message = non_moe_refusal(mixtral(num_hidden_layers=3), tmp_path)
    assert "missing model.layers.2.self_attn.q_proj.weight" in message
    message = non_moe_refusal(mixtral(tie_word_embeddings=True), tmp_path)
    assert "unknown lm_head.weight" in message
    message = non_moe_refusal(mixtral(), tmp_path, {"path": "some/base", "fingerprint": "other"})
    assert message.startswith("the tuned weights belong to another base than")
    with pytest.raises(FinetuneError, match=r"quantization\.attention must be 16bit"):
        load_non_moe(quantize_attention(mixtral()), tmp_path)


def test_missing_and_damaged_tuned_weights(tmp_path: Path):
    save_non_moe(tuned_model(), tmp_path, base=BASE)
    tensors = tmp_path / "non_moe.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in non_moe_refusal(mixtral(), tmp_path)
    save_file(load_file_bytes(whole, tmp_path), tensors)
    assert "does not say which base it belongs to" in non_moe_refusal(mixtral(), tmp_path)
    tensors.unlink()
    assert "non_moe.safetensors is missing" in non_moe_refusal(mixtral(), tmp_path)


def load_file_bytes(content: bytes, tmp_path: Path) -> dict[str, torch.Tensor]:
    path = tmp_path / "copy"
    path.write_bytes(content)
    return load_file(path)


# ---- writing --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_non_moe(tuned_model(), tmp_path, base=BASE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(non_moe, "save_file", half)
    with pytest.raises(OutputError) as caught:
        save_non_moe(tuned_model(router=True), tmp_path, base=BASE)
    message = str(caught.value)
    assert "could not be written: [Errno 28] No space left on device" in message
    assert f"where: {tmp_path / 'non_moe.safetensors'}" in message
    assert "fix: free space there" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_is_not_half_written_either(adapter: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    peft_model = load_adapter(build(), adapter, is_trainable=True)

    def half(folder: str, **_: object) -> None:
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_model, "save_pretrained", half)
    with pytest.raises(OutputError, match="No space left on device"):
        save_adapter(peft_model, adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        save_non_moe(tuned_model(), tmp_path / "file", base=BASE)


def test_what_a_folder_holds(tmp_path: Path, adapter: Path):
    assert kind_of(adapter) == "lora"
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nowhere") is None
    save_non_moe(tuned_model(), tmp_path, base=BASE)
    assert kind_of(tmp_path) == "non_moe"
    (tmp_path / "non_moe.safetensors").unlink()
    assert kind_of(tmp_path) == "non_moe", "what is left says what is missing"
