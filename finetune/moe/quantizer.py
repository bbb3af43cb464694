"""The transformers quantizer: experts become quantized modules, attention optionally bitsandbytes' `Linear4bit`.

transformers >= 5 merges a hub checkpoint's per-expert matrices into one fused tensor a layer and then runs the
quantizer's operation on it, one tensor at a time (`core_model_loading.convert_and_load_state_dict_in_model`). Ours
quantizes the fused tensor expert by expert and sets the result on the module itself, as upstream's MXFP4 quantizer
does, so at most one layer's fused tensor is alive. A folder that holds quantized tensors already matches the module's
parameter names and is read as it is.

A weight is cast to the load dtype before it is quantized, as upstream casts every tensor: a bf16 checkpoint gives the
same bits in float32 and bfloat16, and other bits in float16 where that cannot hold a value.

Left to upstream: the layer of 4-bit attention (bitsandbytes'), and reading a saved one.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, replace_with_bnb_linear
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.checkpoint import misshapen
from finetune.errors import ModelError
from finetune.kernels import BLOCK, ExpertStorage, quantized_parameter
from finetune.moe.arch import EXPERT_PROJECTIONS, MoeArch, experts_path
from finetune.moe.config import QUANT_METHOD, REFUSAL_KEY, Moe4bitConfig
from finetune.moe.experts import QuantizedExperts
from finetune.moe.finite import require_finite
from finetune.private_api import save_own_names

# NF4 with double quantization: 0.5 B of nibbles, 1/64 B of scales, 4/(64 * 256) B of nested scales a weight.
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)
# HQQ: the codes, and 4 B of scale and zero for 64 weights.
EXPERT_BYTES_PER_WEIGHT: dict[ExpertStorage, float] = {
    "nf4": NF4_BYTES_PER_WEIGHT,
    "hqq3": 3 / 8 + 4 / BLOCK,
    "hqq2": 2 / 8 + 4 / BLOCK,
}

# Every tensor of a bitsandbytes 4-bit weight in a saved folder; the bare weight last, since transformers < 5.2x
# takes the first pattern that matches.
_LINEAR4BIT_NAMES = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight",
]


@register_quantizer(QUANT_METHOD)
class Moe4bitQuantizer(HfQuantizer):
    """Loads and saves models under a `Moe4bitConfig`."""

    requires_calibration = False
    quantization_config: Moe4bitConfig

    def __init__(self, quantization_config: Moe4bitConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # Weights to quantize whose shape is not the config's, found while loading: name -> (checkpoint's, model's).
        self.misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    # ---- before loading: give the skeleton its quantized modules -------------------------------------------

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Without a device map the model goes where quantizing is fastest: the GPU if there is one."""
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """The first sight of the model's config, before its files are looked up: takes the refusal of others away."""
        vars(config).pop(REFUSAL_KEY, None)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """As `update_attn_implementation`, which transformers 5.17 does not call."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        arch = MoeArch.from_config(model.config.to_dict(), where=type(model).__name__)
        _require_multiples_of_block(arch)
        for layer in range(arch.layers):
            experts = QuantizedExperts(
                arch.experts,
                arch.hidden,
                arch.intermediate,
                storage=self.quantization_config.experts,
                awaits_fused=not self.pre_quantized,
            )
            model.set_submodule(experts_path(layer), experts)
        if self.quantization_config.attention == "nf4":
            # The head is the only other nn.Linear; the router is a module of its own.
            replace_with_bnb_linear(
                model,
                modules_to_not_convert=["lm_head"],
                quantization_config=_linear4bit_config(model.dtype),
                pre_quantized=self.pre_quantized,
            )
        return model

    # ---- while loading ----------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return name in EXPERT_PROJECTIONS
        return isinstance(module, Linear4bit) and name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes a weight will take; upstream reserves device memory by it before loading."""
        if self.param_needs_quantization(model, param_name):
            module, _ = get_module_from_name(model, param_name)
            return EXPERT_BYTES_PER_WEIGHT[module.storage if isinstance(module, QuantizedExperts) else "nf4"]
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self.pre_quantized and self.quantization_config.attention == "nf4":
            return [WeightConverter(_LINEAR4BIT_NAMES, "weight", [Bnb4bitDeserialize(self)])]
        return []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """A saved folder loads in any dtype: parameters are cast to the model's, the parts of a 4-bit weight, whose
        parameter is uint8, are read as they are. Upstream leaves every name that ends in `weight` uncast."""
        return dtype if dtype is not None and dtype.is_floating_point else None

    # ---- after loading ----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.misshapen:
            (name, (found, expected)), *others = self.misshapen.items()
            raise misshapen(name + (f" and {len(others)} more" if others else ""), found, expected)
        require_finite(model)
        # peft and TRL look at this flag to find bitsandbytes layers; it says nothing about our experts.
        model.is_loaded_in_4bit = self.quantization_config.attention == "nf4"  # type: ignore[assignment]
        save_own_names(model)
        for module in model.modules():
            if isinstance(module, QuantizedExperts):
                module.requires_grad_(False)
            elif isinstance(module, Linear4bit):
                # A plain parameter stands where the checkpoint had no weight; upstream reports it as missing.
                if isinstance(module.weight, Params4bit):
                    # bitsandbytes' backward rounds the weight to the dtype that was quantized: of a saved folder, the
                    # one of the day it was made.
                    module.weight.quant_state.dtype = module.compute_dtype
                # On CPUs with AVX512-BF16 the first forward in eval mode would repack the weight in place for a kernel
                # that has no gradient, and round its scales to bf16: what is saved would not be what was loaded.
                module.support_avx512bf16_for_cpu = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Tells transformers' Trainer that a model without an adapter may train: its non-MoE parameters are floats."""
        return self.quantization_config.attention == "16bit"


class _Quantize(ConversionOps):
    """Fused experts into their module, attention into bitsandbytes' parameter."""

    def __init__(self, quantizer: Moe4bitQuantizer):
        self.quantizer = quantizer

    def convert(  # type: ignore[override]  # upstream passes every argument by name
        self,
        input_dict: dict[str, list[Tensor]],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert full_layer_name is not None
        module, name = get_module_from_name(model, full_layer_name)
        (values,) = input_dict.values()
        value = values[0] if isinstance(values, list) else values
        expected = module.get_parameter(name).shape
        if value.shape != expected:
            assert missing_keys is not None
            missing_keys.discard(full_layer_name)
            # Upstream skips its own check for weights that are quantized, and would bury an error raised here in a
            # log: told when loading has ended.
            self.quantizer.misshapen[full_layer_name] = (tuple(value.shape), tuple(expected))
            return {}
        if isinstance(module, Linear4bit):
            return {full_layer_name: quantized_parameter(value, module)}
        module.quantize(name, value)
        assert missing_keys is not None
        missing_keys.discard(full_layer_name)
        return {}


def _linear4bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )


def _require_multiples_of_block(arch: MoeArch) -> None:
    for name, (_, in_) in {**arch.expert_shapes(), **arch.attention_shapes()}.items():
        if in_ % BLOCK:
            raise ModelError(
                f"the input dimension {in_} of {name} is not a multiple of {BLOCK}, so a block would span two rows",
                where="config.json",
                allowed=f"hidden, intermediate and attention widths that {BLOCK} divides",
                fix="use another checkpoint",
            )
