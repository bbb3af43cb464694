"""`finetune adapter inspect`: norms against float64 products in full, and what is known of base, recipe and data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapter.lora import add_attention_lora, save_adapter
from finetune.adapter.non_moe import save_non_moe, unfreeze_non_moe
from finetune.adapter.report import inspect_adapter
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base
from tests.running import refused, run_finetune


def trained(base: Path, folder: Path, **lora: Any) -> None:
    loaded = load_base(BaseSpec(str(base), attention="16bit"), device="cpu")
    torch.manual_seed(3)
    model = add_attention_lora(loaded.model, loaded.arch, r=4, alpha=8, **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, folder)
    loaded.base.save(folder)


def norms_of(document: dict[str, Any]) -> dict[tuple[int | None, str], dict[str, float | None]]:
    return {(layer["layer"], name): norms for layer in document["layers"] for name, norms in layer["norms"].items()}


@pytest.mark.parametrize(
    ("lora", "kind"),
    [({}, "LoRA"), ({"use_rslora": True}, "rsLoRA"), ({"use_dora": True}, "DoRA"), ({"router": True}, "LoRA")],
    ids=["lora", "rslora", "dora", "router"],
)
def test_norms_are_those_of_the_whole_update(
    small_mixtral: Path, tmp_path: Path, lora: dict[str, bool], kind: str
) -> None:
    folder = tmp_path / "adapter"
    trained(small_mixtral, folder, **lora)
    tensors, base = load_file(folder / "adapter_model.safetensors"), load_file(small_mixtral / "model.safetensors")
    document = inspect_adapter(folder)
    found = norms_of(document)
    scaling = 8 / math.sqrt(4) if kind == "rsLoRA" else 8 / 4
    for layer in range(2):
        for target in ("q_proj", "k_proj", "v_proj", "o_proj"):
            path = f"model.layers.{layer}.self_attn.{target}"
            a, b = (tensors[f"base_model.model.{path}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
            weight = base[f"{path}.weight"].double()
            update = scaling * (b @ a)
            if kind == "DoRA":
                magnitude = tensors[f"base_model.model.{path}.lora_magnitude_vector"].double()[:, None]
                update = magnitude * (weight + update) / (weight + update).norm(dim=1, keepdim=True) - weight
            norms = found[layer, target]
            assert norms["update"] == pytest.approx(update.norm().item(), rel=1e-9)
            assert norms["relative"] == pytest.approx((update.norm() / weight.norm()).item(), rel=1e-9)
        if "router" in lora:
            tuned = tensors[f"base_model.model.model.layers.{layer}.mlp.gate.weight"].double()
            (stored,) = [base[name].double() for name in base if f"layers.{layer}." in name and "gate.weight" in name]
            assert found[layer, "gate"]["update"] == pytest.approx((tuned - stored).norm().item(), rel=1e-9)
    assert (document["kind"], document["rank"], document["alpha"], document["scaling"]) == (kind, 4, 8, scaling)
    assert document["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert (document["base"]["attention"], document["base"]["at_hand"]) == ("16bit", True)


def test_without_the_base_norms_are_absolute(small_mixtral: Path, tmp_path: Path) -> None:
    trained(small_mixtral, tmp_path / "adapter")
    known = norms_of(inspect_adapter(tmp_path / "adapter"))
    base = json.loads((tmp_path / "adapter" / "base.json").read_text())
    (tmp_path / "adapter" / "base.json").write_text(json.dumps(base | {"path": "owner/model"}))
    document = inspect_adapter(tmp_path / "adapter")
    for place, norms in norms_of(document).items():
        assert norms == {"update": known[place]["update"], "base": None, "relative": None}
    assert not document["base"]["at_hand"]
    ran = run_finetune("adapter", "inspect", tmp_path / "adapter")
    assert ran.status == 0, ran.stderr
    assert "--base FOLDER gives them relative" in ran.stdout


def test_a_non_moe_tuning_shows_how_far_it_went(small_mixtral: Path, tmp_path: Path) -> None:
    loaded = load_base(BaseSpec(str(small_mixtral), attention="16bit"), device="cpu")
    before = {name: p.detach().double().clone() for name, p in loaded.model.named_parameters()}
    unfreeze_non_moe(loaded.model, loaded.arch)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    save_non_moe(loaded.model, tmp_path / "adapter", base={"path": loaded.base.path})
    loaded.base.save(tmp_path / "adapter")
    document = inspect_adapter(tmp_path / "adapter")
    found = norms_of(document)
    assert (document["kind"], document["rank"], document["targets"]) == ("non-MoE", None, [])
    for name, place in {
        "model.layers.1.self_attn.k_proj.weight": (1, "k_proj"),
        "model.layers.0.input_layernorm.weight": (0, "input_layernorm"),
        "model.embed_tokens.weight": (None, "embed_tokens"),
    }.items():
        far = (loaded.model.get_parameter(name).double() - before[name]).norm().item()
        assert found[place]["update"] == pytest.approx(far, rel=1e-9)


def test_the_run_says_recipe_and_data(finished_run: Path) -> None:
    ran = run_finetune("adapter", "inspect", finished_run / "adapter", "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["recipe"] == str(finished_run / "recipe.yaml")
    assert ran.document["data"]["fingerprint"] == "f" * 32
    shown = run_finetune("adapter", "inspect", finished_run / "adapter").stdout
    for words in ("4, 32, 8", "k_proj, o_proj, q_proj, v_proj", "HuggingFaceH4/no_robots", "f" * 32):
        assert words in shown


def test_what_is_no_adapter_or_of_another_base_is_refused(
    finished_run: Path, small_mixtral: Path, tmp_path: Path
) -> None:
    adapter = finished_run / "adapter"
    refused(tmp_path, "adapter", "inspect", tmp_path, says=("adapter_config.json is missing", "a training run saved"))
    refused(tmp_path, "adapter", "inspect", tmp_path / "no", says=("no adapter folder",))
    other = shutil.copytree(small_mixtral, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    router = next(name for name in tensors if name.endswith("gate.weight"))
    save_file(tensors | {router: tensors[router] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    says = ("trained on another base: the routers differ", str(other))
    refused(tmp_path, "adapter", "inspect", adapter, "--base", other, says=says)
    (adapter / "base.json").unlink()
    tensors = {name: torch.cat([tensor, tensor], 1) for name, tensor in load_file(adapter / _TENSORS).items()}
    save_file(tensors, adapter / _TENSORS)
    says = ("the adapter does not fit this base: its update is ", "the base's weight")
    refused(tmp_path, "adapter", "inspect", adapter, "--base", small_mixtral, says=says)


_TENSORS = "adapter_model.safetensors"
