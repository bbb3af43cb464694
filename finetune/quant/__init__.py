"""`import finetune.quant`: what cards and refusals of folders published before the rooms moved tell people to write.

It registers the storage of the experts with transformers, as `from finetune import Moe4bitConfig` does.
"""

from finetune.moe import Moe4bitConfig

__all__ = ["Moe4bitConfig"]
