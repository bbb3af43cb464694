"""Routers that train: exactly they besides the adapter, as float32 masters, and back from disk with stock `peft`.

Truth: names written out, stock PEFT on a stock transformers model, gradients of a plain model in float64, the learning
rates and weight decays that the optimizer holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.adapter.adapter import load
from finetune.adapter.lora import add_attention_lora, load_adapter, save_adapter
from finetune.adapter.masters import trainable_count
from finetune.console import Report
from finetune.errors import AdapterError, FinetuneError
from finetune.memory.activations import ActivationPlan, apply_plan
from finetune.moe.arch import MoeArch, role_of
from finetune.recipe.load import load_recipe
from finetune.router.capture import RouterCapture
from finetune.train.run import prepare
from tests.models import EXPERTS, FAMILIES, HIDDEN, LAYERS, dequantized_twin, tiny_model, tokens
from tests.moe.loading import load as load_quantized
from tests.running import run_finetune

Write = Callable[..., Path]
LORA = {
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{side}.default.weight"
    for layer in range(LAYERS)
    for name in "qkvo"
    for side in "AB"
}
ROUTERS = {f"base_model.model.model.layers.{layer}.mlp.gate.modules_to_save.default.weight" for layer in range(LAYERS)}


def tuned(family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    """An adapter with routers, as if it had been trained."""
    model = tiny_model(family, dtype=dtype)
    peft_model = add_attention_lora(model, MoeArch.from_config(model.config.to_dict()), r=4, router=True)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return peft_model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_routers_train_besides_the_adapter(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    arch = MoeArch.from_config(model.config.to_dict())
    peft_model = add_attention_lora(model, arch, r=4, router=True)
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert set(trained) == LORA | ROUTERS
    assert {p.dtype for p in trained.values()} == {torch.float32}
    lora = arch.lora_params(4)
    assert trainable_count(peft_model) == lora + LAYERS * EXPERTS * HIDDEN == arch.lora_params(4, router=True)
    for name in ROUTERS:
        original = name.replace("modules_to_save.default", "original_module")
        assert (role_of(name), role_of(original)) == ("adapter", "router")
        frozen = dict(peft_model.named_parameters())[original]
        base_name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(frozen, before[base_name])
        assert torch.equal(trained[name], frozen.float())
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), logits(tiny_model(family, dtype=torch.bfloat16)))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_it_onto_the_stock_model(tmp_path: Path, family: str) -> None:
    ours = tuned(family)
    save_adapter(ours, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {
        f"base_model.model.model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)
    }
    stock = PeftModel.from_pretrained(tiny_model(family), str(tmp_path))
    expected = logits(stock)
    # Measured: equal to the bit.
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny_model(family)), atol=1e-2)
    torch.testing.assert_close(logits(load_adapter(tiny_model(family), tmp_path)), expected, rtol=0, atol=1e-5)
    without = add_attention_lora(tiny_model(family), MoeArch.from_config(ours.get_base_model().config.to_dict()), r=4)
    without.load_state_dict({n: p for n, p in ours.state_dict().items() if "lora_" in n}, strict=False)
    assert not torch.allclose(logits(without), expected, atol=1e-3), "the routers say nothing"


def test_masters_come_back_to_the_bit_to_go_on_training(tmp_path: Path) -> None:
    ours = tuned(dtype=torch.bfloat16)
    save_adapter(ours, tmp_path)
    again = load_adapter(tiny_model("mixtral", dtype=torch.bfloat16), tmp_path, is_trainable=True)
    before = dict(ours.named_parameters())
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad == (name in LORA | ROUTERS)
        assert torch.equal(parameter, before[name])
    assert torch.isfinite(logits(again)).all(), "without autocast, too"
    # Served, they take the base's type, once.
    served = dict(load_adapter(tiny_model("mixtral", dtype=torch.bfloat16), tmp_path).named_parameters())
    assert all(torch.equal(served[name], before[name].to(torch.bfloat16)) for name in ROUTERS)


def test_an_adapter_made_with_stock_peft_loads(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    stock = get_peft_model(tiny_model("mixtral"), config)
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    found = logits(load_adapter(tiny_model("mixtral"), tmp_path))
    torch.testing.assert_close(found, logits(stock), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "tensors", "said"),
    [
        (["mlp.gate", "lm_head"], {}, "modules_to_save is ['mlp.gate', 'lm_head']"),
        (["lm_head"], {}, "modules_to_save is ['lm_head']"),
        (None, {}, "unknown base_model.model.model.layers.0.mlp.gate.weight"),
        (["mlp.gate"], {0: None}, "missing base_model.model.model.layers.0.mlp.gate.weight"),
        (["mlp.gate"], {1: (EXPERTS + 1, HIDDEN)}, f"is [{EXPERTS + 1}, {HIDDEN}], this model needs [4, {HIDDEN}]"),
    ],
)
def test_more_or_less_than_the_routers_is_refused(
    tmp_path: Path, modules: list[str] | None, tensors: dict[int, tuple[int, int] | None], said: str
) -> None:
    save_adapter(tuned(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": modules}))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for layer, shape in tensors.items():
        name = f"base_model.model.model.layers.{layer}.mlp.gate.weight"
        saved.pop(name)
        if shape is not None:
            saved[name] = torch.zeros(shape)
    save_file(saved, tmp_path / "adapter_model.safetensors")
    model = tiny_model("mixtral")
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path)
    assert said in str(caught.value)
    assert not any("lora_" in name for name, _ in model.named_parameters()), "the model was touched"


# ---- a step ---------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad(set_to_none=True)
    model(input_ids=tokens(2, 17), labels=tokens(2, 17), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def quantized(folder: Path) -> Any:
    tiny_model("mixtral").save_pretrained(folder)
    model = load_quantized(folder, "16bit")
    return add_attention_lora(model, MoeArch.from_config(model.config.to_dict()), r=4, router=True)


def test_gradients_equal_those_of_the_plain_model_and_no_plan_changes_a_bit(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    expected = gradients(model)
    assert set(expected) == LORA | ROUTERS
    base = model.get_base_model()
    twin: Any = dequantized_twin(load_quantized(tmp_path, "16bit"), torch.float64)
    twin.requires_grad_(False)
    for layer in range(LAYERS):
        twin.model.layers[layer].mlp.gate.weight.requires_grad_(True)
    for name, gradient in gradients(twin).items():
        ours = expected[f"base_model.model.{name}".replace("gate.weight", "gate.modules_to_save.default.weight")]
        # A fresh adapter is the identity. Measured: 2e-6 of the largest, float32 against float64.
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())
    for plan in (ActivationPlan.full(LAYERS), ActivationPlan.last(LAYERS, attention=1, gate_up=0)):
        apply_plan(model, MoeArch.from_config(base.config.to_dict()), plan)
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_the_capture_counts_them(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    apply_plan(model, MoeArch.from_config(model.get_base_model().config.to_dict()), ActivationPlan.full(LAYERS))
    with RouterCapture(model, num_experts=EXPERTS, top_k=2) as capture:
        gradients(model)
        assert capture.snapshot("train").tokens == 34


# ---- through the trainer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attention_lora", "non_moe"])
def test_the_routers_have_their_own_learning_rate(write_recipe: Write, method: str) -> None:
    training = {"weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "linear", "learning_rate": 2e-3}
    trainable = {"method": method, "router": True, "router_learning_rate": 0.5}
    quantization = {"attention": "16bit"}
    path = write_recipe(
        training=training, trainable=trainable, quantization=quantization, router={"log": False, "figures": False}
    )
    trainer = prepare(load_recipe(path), Report(as_json=True)).trainer
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [2e-3, 2e-3, 0.5]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    by_group = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sum(map(len, by_group)) == len({name for one in by_group for name in one})
    routers = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "mlp.gate" in name}
    assert by_group[2] == routers
    assert len(routers) == 2
    # One schedule: after the last of four steps both are back at zero; what is logged is the run's own.
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
        [2e-3, 1.5e-3, 1e-3, 0.5e-3]
    )
    assert {group["lr"] for group in groups} == {0.0}


class Alone(torch.optim.SGD):
    """Holds no parameter of the model, as upstream's optimizers that step layer by layer."""

    def __init__(self, groups: Any):
        super().__init__([torch.zeros(1)], lr=1.0)


def test_without_one_they_have_the_runs_and_not_every_optimizer_has_groups(write_recipe: Write) -> None:
    path = write_recipe(trainable={"router": True}, router={"log": False, "figures": False})
    trainer = prepare(load_recipe(path), Report(as_json=True)).trainer
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [2e-3, 2e-3]
    trainer.optimizer, trainer.optimizer_cls_and_kwargs, trainer.router_learning_rate = None, (Alone, {}), 0.5
    with pytest.raises(FinetuneError) as caught:
        trainer.create_optimizer()
    message = str(caught.value)
    assert message.startswith("Alone takes no groups of parameters, so no learning rate for the routers alone\n")
    assert "where: trainable.router_learning_rate\n  allowed: null with training.optim: adamw_torch_fused\n" in message
    assert "fix: remove it, or set training.optim: adamw_torch_fused" in message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_mixtral: Path, conversations: Path) -> Path:
    """The folder of a run of eight steps that trained routers, with checkpoints."""
    folder = tmp_path_factory.mktemp("router") / "run"
    recipe = {
        "model": {"path": str(small_mixtral), "device": "cpu"},
        "trainable": {"router": True, "router_learning_rate": 0.01},
        "data": {"train": str(conversations), "eval": str(conversations), "max_eval_rows": 8},
        "training": {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 4,
        },
        "output": {"dir": str(folder)},
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    ran = run_finetune("train", path, "--json")
    assert ran.status == 0, ran.stderr
    # r * (in + out) of q, k, v, o in two layers of hidden 64, kv width 32; two routers of 4 experts.
    assert ran.document["trainable_parameters"] == 2 * 16 * (128 + 96 + 96 + 128) + 2 * 4 * 64
    return folder


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_saves_what_it_trained_and_stock_peft_takes_it(run: Path, small_mixtral: Path) -> None:
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    base = load_file(small_mixtral / "model.safetensors")
    routers = {name: tensor for name, tensor in saved.items() if "lora_" not in name}
    assert len(routers) == 2
    originals = sorted(name for name in base if name.endswith(".gate.weight"))
    for (name, tensor), original in zip(sorted(routers.items()), originals, strict=True):
        assert tensor.dtype == torch.float32
        assert (tensor - base[original].float()).abs().max() > 1e-3, name
    loaded = load(str(run / "adapter"), device="cpu")
    stock = PeftModel.from_pretrained(dequantized_twin(load(str(small_mixtral), device="cpu").model), run / "adapter")
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Measured: equal to the bit; NF4 attention is dequantized to the same values.
        torch.testing.assert_close(loaded.model(ids).logits, stock.eval()(ids).logits, rtol=0, atol=2e-6)


def test_it_merges_by_one_rounding(run: Path, conversations: Path, tmp_path: Path) -> None:
    args = ("--data", conversations, "--rows", 8, "--device", "cpu", "--json")
    report = run_finetune("merge", run / "adapter", "--output", tmp_path / "merged", *args).document["fidelity"]
    # Measured: KL 1.8e-8, overlap 100%, loss 10.02471 and 10.02465.
    assert report["kl"] < 1e-6
    assert report["top_k_overlap"] > 0.98
    assert report["candidate_loss"] == pytest.approx(report["reference_loss"], abs=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    for layer in range(2):
        found = merged.get_submodule(f"model.layers.{layer}.mlp.gate").weight
        trained = saved[f"base_model.model.model.layers.{layer}.mlp.gate.weight"]
        assert torch.equal(found, trained.to(torch.bfloat16).float())
    live = load(str(run / "adapter"), device="cpu")
    again = load(str(tmp_path / "merged"), device="cpu")
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (live.model(ids).logits - again.model(ids).logits).abs().max() < 0.02


def test_it_resumes_with_the_same_losses_and_routers(run: Path) -> None:
    expected, trained = losses(run), load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(expected) == 8
    (run / "checkpoints" / "checkpoint-8" / "trainer_state.json").unlink()
    ran = run_finetune("train", run.parent / "recipe.yaml", "--resume")
    assert ran.status == 0, ran.stderr
    assert losses(run) == expected
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())
