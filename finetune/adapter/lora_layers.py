"""PEFT's LoRA layers with the fused operation of `kernels/lora.py` where it says the same.

PEFT takes layer classes of one's own by a mapping in its config. Parameters, names, saving, merging and everything
unusual (dropout while training, DoRA, several or no active adapters, a merged layer) stay PEFT's: these classes only
replace `forward` for the usual case.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

from finetune import private_api
from finetune.kernels import Nf4Weights, dequantize_experts, lora_linear, nf4_of_linear


def register_lora_layers(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build these layers for this config; nothing of it is saved with the adapter."""
    private_api.register_lora_layers(config, {Linear4bit: FusedLoraLinear4bit, nn.Linear: FusedLoraLinear})
    return config


class _Fused:
    """`forward` of both layers, before PEFT's own in the method resolution order."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        usual = (
            name in self.lora_A
            and self._readable()
            and not (args or kwargs or self.disable_adapters or self.merged)
            and name not in self.lora_variant
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and self.get_base_layer().bias is None
            and self.lora_B[name].bias is None
        )
        if not usual:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, self._frozen_weight(), a, b, self.scaling[name])


class FusedLoraLinear4bit(_Fused, PeftLinear4bit):
    """LoRA on a bitsandbytes 4-bit layer."""

    def _layer(self) -> Linear4bit:
        layer = self.get_base_layer()
        assert isinstance(layer, Linear4bit), type(layer)
        return layer

    def _readable(self) -> bool:
        # On CPUs with AVX512-BF16, bitsandbytes packs a weight anew when its own layer runs without gradients, and
        # says so by an attribute that it sets only then.
        state: Any = self._layer().weight.quant_state  # type: ignore[attr-defined]  # Params4bit carries it
        return not vars(state).get("packing_format_for_cpu", False)

    _resident: Tensor | None = None

    def keep_dequantized(self, dtype: torch.dtype) -> None:
        """Dequantizes the frozen weight once and for all: the same values, for 2 bytes a weight instead of passes.

        2.5 GiB for Mixtral 8x7B. A step without checkpointing launches 128 dequantizations instead of 381, 77.5 ms of
        them instead of 80.0 (H100, 2 x 1024 tokens, `finetune bench train`).
        """
        self._resident = dequantize_experts(nf4_of_linear(self._layer()), dtype)[0]

    def _frozen_weight(self) -> Nf4Weights | Tensor:
        return nf4_of_linear(self._layer()) if self._resident is None else self._resident


class FusedLoraLinear(_Fused, PeftLinear):
    """LoRA on a 16- or 32-bit layer."""

    def _readable(self) -> bool:
        return True

    def _frozen_weight(self) -> Tensor:
        layer = self.get_base_layer()
        assert isinstance(layer, nn.Linear), type(layer)
        return layer.weight.detach()
