"""Which parameters train, and how what was trained is saved and put back.

Why: with fused experts the usual ways to say "train the attention" fail silently. PEFT's `all-linear` reaches the
router and the experts, a misspelled target can match nothing, `prepare_model_for_kbit_training` casts 180 GB of
frozen weights to fp32, and loading an adapter of another shape is a warning. Here exactly one of two sets trains, and
its size is asserted against the formula in `MoeArch`: LoRA on q/k/v/o of every layer (lora.py), or everything but the
experts (non_moe.py).

Leaves out: merging (export/) and checkpoints of the optimizer (the trainer's).
"""

from finetune.trainable.files import check_tuned, read_adapter_kind
from finetune.trainable.lora import (
    add_adapters,
    add_attention_lora,
    check_targets,
    load_adapter,
    read_saved,
    save_adapter,
)
from finetune.trainable.lora_layers import FusedLoraLinear4bit
from finetune.trainable.masters import keep_fp32_masters, trainable_count, trained_tensors
from finetune.trainable.non_moe import load_non_moe, save_non_moe, unfreeze_non_moe

__all__ = [
    "FusedLoraLinear4bit",
    "add_adapters",
    "add_attention_lora",
    "check_targets",
    "check_tuned",
    "keep_fp32_masters",
    "load_adapter",
    "load_non_moe",
    "read_adapter_kind",
    "read_saved",
    "save_adapter",
    "save_non_moe",
    "trainable_count",
    "trained_tensors",
    "unfreeze_non_moe",
]
