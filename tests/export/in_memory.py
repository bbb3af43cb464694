"""The nf4 merge made in memory: PEFT's layers merged one by one in a loaded model, which transformers then saves.

The truth that the streamed writer is held to. Needs the whole model in memory, which is why it is not the product.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from finetune import Moe4bitConfig
from finetune.kernels.nf4 import dequantize_linear
from finetune.moe.config import refuse_without_toolkit
from finetune.moe.experts import QuantizedExperts
from finetune.moe.load import LoadedModel


def merged_weight(lora: LoraLayer) -> Tensor:
    """[out, in] float32: what a LoRA or DoRA layer computes with, the base's weight plus the update."""
    layer: Any = lora  # torch types a submodule's attributes as tensors
    a, b = (layer.get_submodule(part)["default"].weight.float() for part in ("lora_A", "lora_B"))
    weight = dequantize_linear(layer.get_base_layer()) + layer.scaling["default"] * (b @ a)
    if "default" not in layer.lora_magnitude_vector:
        return weight
    magnitude = layer.lora_magnitude_vector["default"].weight.float().view(-1, 1)
    return magnitude * weight / weight.norm(dim=1, keepdim=True)


@torch.no_grad()
def save_merged(live: LoadedModel, folder: Path) -> None:
    """Merges the live adapter or tuning into its own model, which is used up, and saves that."""
    base: Any = live.model
    if isinstance(live.model, PeftModel):
        for name, module in list(live.model.named_modules()):
            if isinstance(module, LoraLayer):
                plain: Any = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight = nn.Parameter(merged_weight(module), requires_grad=False)
                live.model.set_submodule(name, plain)
            elif isinstance(module, ModulesToSaveWrapper):
                router: Any = copy.deepcopy(module.original_module)
                router.weight.data = module.modules_to_save["default"].get_parameter("weight").data
                live.model.set_submodule(name, router)
        base = live.model.get_base_model()
        base._hf_peft_config_loaded = False
    for module in base.modules():
        if not isinstance(module, QuantizedExperts):  # whose scales are part of their bits
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    quantization = Moe4bitConfig(attention="16bit", experts=base.hf_quantizer.quantization_config.experts)
    base.hf_quantizer.quantization_config = base.config.quantization_config = quantization
    base.is_loaded_in_4bit = False
    base.save_pretrained(folder)
    refuse_without_toolkit(folder)
