"""A quantized model of any shape from random weights, without a checkpoint: to measure memory and speed.

Every tensor is drawn on the device and every NF4 expert is really quantized; only the values mean nothing. Random
routers spread tokens almost evenly, which is kinder than a trained model's load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

import finetune.moe.quantizer  # noqa: F401 - registers the storage of the experts with transformers
from finetune.kernels import BITS, random_low_bit
from finetune.moe.arch import EXPERT_PROJECTIONS
from finetune.moe.config import Moe4bitConfig
from finetune.moe.experts import QuantizedExperts


def build_random_model(
    config: PreTrainedConfig,
    quantization: Moe4bitConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
    seed: int,
    experts_device: torch.device | None = None,
) -> PreTrainedModel:
    """The model that `from_pretrained` would give for a checkpoint of normal(0, initializer_range) weights.

    Args:
        experts_device: where the experts go, if elsewhere, each layer's as soon as it is quantized.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(
            0.0, config.initializer_range, generator=generator
        )

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for projection in EXPERT_PROJECTIONS:
                shape = module.get_parameter(projection).shape
                if module.storage == "nf4":
                    module.quantize(projection, draw(shape, dtype))
                else:
                    std = config.initializer_range
                    weights = random_low_bit(BITS[module.storage], shape, std, device, generator)
                    module.set_packed(projection, weights)
            module.to(experts_device or device)
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}"
            value = torch.ones_like(parameter, device=device) if "norm" in name else draw(parameter.shape, dtype)
            if quantizer.param_needs_quantization(model, full):
                value = quantizer.get_quantize_ops().convert({full: [value]}, model=model, full_layer_name=full)[full]
            module.register_parameter(
                key, value if isinstance(value, nn.Parameter) else nn.Parameter(value, parameter.requires_grad)
            )
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(key, torch.empty_like(buffer, device=device), persistent=False)
    _fill_rotary(model, device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _fill_rotary(model: PreTrainedModel, device: torch.device) -> None:
    """Recomputes the rotary frequencies, the only buffers that these models have."""
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config=model.config).to(device)
    rotary.load_state_dict(fresh.state_dict())
    for key, buffer in fresh.named_buffers(recurse=False):
        rotary.register_buffer(key, buffer, persistent=False)
