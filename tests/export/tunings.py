"""Tunings with random weights, as runs would have saved them, and the merged weights worked out in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.adapter.lora import add_attention_lora, save_adapter
from finetune.adapter.non_moe import save_non_moe, unfreeze_non_moe
from finetune.moe.base_spec import BaseSpec
from finetune.moe.census import hash_experts
from finetune.moe.load import LoadedModel, load_base


def tuned(
    base: Path, folder: Path, *, attention: str = "nf4", scale: float = 0.02, seed: int = 1, **lora: Any
) -> LoadedModel:
    """A LoRA adapter of rank 8 on `base`, saved to `folder`; the model it stays on."""
    loaded = load_base(BaseSpec(str(base), attention=attention), device="cpu")  # type: ignore[arg-type]
    loaded = replace(loaded, base=replace(loaded.base, experts_sha256=hash_experts(loaded.model)))
    torch.manual_seed(seed)
    model: Any = add_attention_lora(loaded.model, loaded.arch, r=8, alpha=16, **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            if "modules_to_save" in name:
                parameter.add_(scale * torch.randn_like(parameter))
    save_adapter(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    loaded.base.save(folder)
    return LoadedModel(model, loaded.tokenizer, loaded.arch, loaded.base, loaded.device)


def tuned_non_moe(base: Path, folder: Path, *, seed: int = 2, router: bool = False) -> LoadedModel:
    """A non-MoE tuning of `base`, saved to `folder`."""
    loaded = load_base(BaseSpec(str(base), attention="16bit"), device="cpu")
    unfreeze_non_moe(loaded.model, loaded.arch, router=router)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    save_non_moe(loaded.model, folder, base={"path": loaded.base.path})
    loaded.tokenizer.save_pretrained(folder)
    loaded.base.save(folder)
    return loaded


def nf4_values(weight: Tensor) -> Tensor:
    """float32 values of a matrix in NF4, by bitsandbytes' own functions."""
    packed, state = bnb.quantize_4bit(
        weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state)


def update(folder: Path, name: str, base: Tensor, *, scaling: float = 2.0) -> Tensor:
    """float64: what an adapter adds to `base`, the weight `name` (transformers' name)."""
    tensors = {key: t.double() for key, t in load_file(folder / "adapter_model.safetensors").items()}
    path = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{path}.weight" in tensors:
        return tensors[f"{path}.weight"] - base.double()
    if f"{path}.lora_A.weight" not in tensors:
        return torch.zeros_like(base, dtype=torch.float64)
    added = scaling * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
    if f"{path}.lora_magnitude_vector" not in tensors:
        return added
    whole = base.double() + added
    norms = (whole**2).sum(1, keepdim=True).sqrt()
    return tensors[f"{path}.lora_magnitude_vector"][:, None] * whole / norms - base.double()


def assert_rounded_once(found: Tensor, expected: Tensor) -> None:
    """A 16-bit tensor is the nearest to the float64 one, up to float32's error in the sum before rounding."""
    assert found.dtype in (torch.bfloat16, torch.float16)
    bits = 8 if found.dtype == torch.bfloat16 else 11
    exponent = torch.floor(torch.log2(expected.abs().clamp_min(2.0**-14)))
    half_ulp = 2.0 ** (exponent - bits)
    slack = 1e-6 * float(expected.abs().max())
    assert ((found.double() - expected).abs() <= half_ulp * (1 + 1e-9) + slack).all()


RSLORA_SCALING = 16 / math.sqrt(8)
