"""Which parameters train.

Why: with fused experts the usual ways to say "train the attention" fail silently. PEFT's `all-linear` reaches the
router and the experts, a misspelled target can match nothing, `prepare_model_for_kbit_training` casts 180 GB of
frozen weights to fp32. Here exactly one of two sets trains, and
its size is asserted against the formula in `MoeArch`: LoRA on q/k/v/o of every layer (lora.py), or everything but the
experts (non_moe.py).

Leaves out: how it is saved and put back (adapter/), merging (export/), checkpoints of the optimizer (the trainer's).
"""

from finetune.trainable.lora import add_attention_lora, check_targets
from finetune.trainable.lora_layers import FusedLoraLinear4bit
from finetune.trainable.masters import keep_fp32_masters, trainable_count, trained_tensors
from finetune.trainable.non_moe import unfreeze_non_moe

__all__ = [
    "FusedLoraLinear4bit",
    "add_attention_lora",
    "check_targets",
    "keep_fp32_masters",
    "trainable_count",
    "trained_tensors",
    "unfreeze_non_moe",
]
