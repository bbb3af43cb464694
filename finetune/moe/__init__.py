"""The transformers quantizer plugin that really stores fused experts in 4-bit.

Importing this package registers it: afterwards `from_pretrained(..., quantization_config=Moe4bitConfig())` quantizes
while loading, and folders saved from such a model load by themselves.
"""

from finetune.moe.census import Census, hash_experts, require_quantized_experts, take_census
from finetune.moe.config import Moe4bitConfig
from finetune.moe.experts import QuantizedExperts
from finetune.moe.quantizer import Moe4bitQuantizer

__all__ = [
    "Census",
    "Moe4bitConfig",
    "Moe4bitQuantizer",
    "QuantizedExperts",
    "hash_experts",
    "require_quantized_experts",
    "take_census",
]
