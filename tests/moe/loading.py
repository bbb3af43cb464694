"""What the tests of this folder share: loading with every tensor accounted for, comparing bits, and LoRA gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.moe import Moe4bitConfig
from tests.models import tokens

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


def add_lora(model: PreTrainedModel) -> PeftModel:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=QKVO, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def copy_lora(source: PeftModel, target: PeftModel) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name].data)


def lora_gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in grads)
    return grads
