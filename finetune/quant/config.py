"""How a MoE is stored: always NF4 experts, and attention in NF4 or 16-bit.

Written into a saved model's config.json as `quantization_config`, so that the folder says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.errors import ModelError

QUANT_METHOD = "moe_4bit"
AttentionStorage = Literal["nf4", "16bit"]


@register_quantization_config(QUANT_METHOD)
@dataclass
class Moe4bitConfig(QuantizationConfigMixin):
    """Fused experts in NF4, blocks of 64, double quantization, each expert by itself; the rest 16-bit.

    Args:
        attention: "nf4" keeps q/k/v/o as bitsandbytes `Linear4bit`; "16bit" leaves them in the load dtype.

    Raises:
        ModelError: an attention storage that does not exist, or a saved config of another format version.
    """

    attention: AttentionStorage

    def __init__(self, attention: AttentionStorage = "nf4", format_version: int = 1, **kwargs: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum upstream, a plain string for plugins
        self.attention = attention
        self.format_version = format_version
        if attention not in get_args(AttentionStorage):
            raise ModelError(
                f"attention storage {attention!r} does not exist",
                where="Moe4bitConfig.attention",
                allowed=" or ".join(get_args(AttentionStorage)),
                fix='use "nf4" for the least memory or "16bit" to train or merge attention exactly',
            )
        if format_version != 1:
            raise ModelError(
                f"this folder was saved in format {format_version} of {QUANT_METHOD}",
                where="config.json: quantization_config.format_version",
                allowed="1",
                fix="upgrade moe-qlora, or quantize the original checkpoint again with `finetune quantize`",
            )
        # `from_dict` of upstream passes whatever the folder holds; only the method's own name may be left.
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise ModelError(
                f"unknown keys {sorted(unknown)} in the quantization config",
                where="Moe4bitConfig",
                allowed="attention, format_version",
                fix="remove them",
            )
