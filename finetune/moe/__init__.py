"""The transformers quantizer plugin that really stores fused experts in 4-bit.

Importing `Moe4bitConfig` from here registers it: afterwards `from_pretrained(..., quantization_config=Moe4bitConfig())`
quantizes while loading, and folders saved from such a model load by themselves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
