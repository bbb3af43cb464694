"""Recipes of other tools: which of our keys each of their keys becomes.

Why: many come with a working YAML of axolotl, LLaMA-Factory, torchtune or `trl sft`, and forty unknown keys are no
answer. How: a table of their names, beside TRL's own (training.py). It says where a value goes, not what it becomes:
that is for whoever knows what the run was for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.errors import FinetuneError
from finetune.recipe.training import OWNERS, RENAMED, open_fields, refusal

_NONE = "leave it out"
_TOKENIZER = f"{_NONE}: the tokenizer at model.path decides it"
_LAUNCHER = f"{_NONE}: `accelerate launch --config_file` says how devices share the work"
_SUPERVISED = f"{_NONE}: what the assistant says is supervised, nothing else"
_CACHED = f"{_NONE}: tokenized rows are kept and found again"
_KERNELS = f"{_NONE}: the kernels are chosen by the device"

# Key (of a section or of an item of a list: after a dot) -> ours. By tool, in the order of a usual file.
_KEYS: Mapping[str, Mapping[str, str]] = {
    "axolotl": {
        "base_model": "model.path",
        "base_model_config": _NONE,
        "model_type": _NONE,
        "tokenizer_type": _NONE,
        "tokenizer_config": _TOKENIZER,
        "is_mistral_derived_model": _NONE,
        "strict": _NONE,
        "plugins": _NONE,
        "datasets": "data.train, and data.more for the second and following",
        "datasets.path": "data.train",
        "datasets.type": "data.format (auto recognizes most)",
        "datasets.split": "data.train_split",
        "datasets.field_messages": "data.columns.messages",
        "datasets.message_property_mappings": "data.columns",
        "datasets.roles": "data.roles",
        "datasets.chat_template": "data.template",
        "test_datasets": "data.eval",
        "dataset_prepared_path": _CACHED,
        "val_set_size": "data.eval_fraction, or data.eval_rows if it is 1 or more",
        "chat_template": "data.template",
        "train_on_inputs": _SUPERVISED,
        "sequence_len": "training.max_length",
        "sample_packing": "training.packing",
        "eval_sample_packing": "training.eval_packing",
        "pad_to_sequence_len": _NONE,
        "adapter": "trainable.method (attention_lora, on 4-bit experts, is QLoRA)",
        "lora_model_dir": _NONE,
        "lora_target_linear": "trainable.lora.target_modules",
        "lora_fan_in_fan_out": _NONE,
        "lora_modules_to_save": "trainable.method: non_moe",
        "micro_batch_size": "training.per_device_train_batch_size",
        "eval_batch_size": "training.per_device_eval_batch_size",
        "num_epochs": "training.num_train_epochs",
        "optimizer": "training.optim",
        "lr_scheduler": "training.lr_scheduler_type",
        "group_by_length": "training.train_sampling_strategy",
        "flash_attention": "model.attn_implementation",
        "xformers_attention": "model.attn_implementation",
        "sdp_attention": "model.attn_implementation",
        "early_stopping_patience": _NONE,
        "evals_per_epoch": "training.eval_strategy and training.eval_steps",
        "saves_per_epoch": "training.save_strategy and training.save_steps",
        "wandb_project": "logging.project, with logging.wandb: online",
        "wandb_entity": _NONE,
        "wandb_watch": _NONE,
        "wandb_name": "logging.run_name",
        "wandb_run_id": _NONE,
        "wandb_log_model": _NONE,
        "hub_model_id": "output.push_to_hub.repo_id",
        "special_tokens": _TOKENIZER,
        "tokens": _TOKENIZER,
        "deepspeed": _LAUNCHER,
        "fsdp": _LAUNCHER,
        "fsdp_config": _LAUNCHER,
        "xpu_visible_devices": _NONE,
    },
    "LLaMA-Factory": {
        "stage": _NONE,
        "finetuning_type": "trainable.method",
        "lora_target": "trainable.lora.target_modules",
        "lora_rank": "trainable.lora.r",
        "dataset": "data.train",
        "dataset_dir": "data.train (with the file's path)",
        "eval_dataset": "data.eval",
        "template": "data.template",
        "cutoff_len": "training.max_length",
        "max_samples": "data.max_rows",
        "overwrite_cache": _CACHED,
        "preprocessing_num_workers": "training.dataset_num_proc",
        "overwrite_output_dir": "`finetune train --overwrite`",
        "plot_loss": _NONE,
        "save_only_model": _NONE,
        "val_size": "data.eval_fraction",
        "mask_history": "data.loss_on: last",
        "quantization_bit": "quantization.experts",
        "quantization_method": "quantization.experts",
        "double_quantization": "quantization.experts",
        "flash_attn": "model.attn_implementation",
        "enable_liger_kernel": "model.fused_layers",
        "use_unsloth": _KERNELS,
        "use_rslora": "trainable.lora.use_rslora",
        "ddp_timeout": _LAUNCHER,
        "moe_aux_loss_coef": "router.balance_coef, with router.aux: train",
    },
    "torchtune": {
        "model._component_": "model.path",
        "model.lora_attn_modules": "trainable.lora.target_modules",
        "model.apply_lora_to_mlp": f"{_NONE}: the experts are frozen",
        "model.apply_lora_to_output": f"{_NONE}: the head takes no LoRA",
        "model.lora_rank": "trainable.lora.r",
        "model.lora_alpha": "trainable.lora.alpha",
        "model.lora_dropout": "trainable.lora.dropout",
        "tokenizer": _TOKENIZER,
        "tokenizer.max_seq_len": "training.max_length",
        "checkpointer": "model.path",
        "checkpointer.checkpoint_dir": "model.path",
        "checkpointer.output_dir": "output.dir",
        "dataset": "data.train",
        "dataset.source": "data.train",
        "dataset.packed": "training.packing",
        "dataset.split": "data.train_split",
        "dataset.train_on_input": _SUPERVISED,
        "batch_size": "training.per_device_train_batch_size",
        "epochs": "training.num_train_epochs",
        "shuffle": "training.shuffle_dataset",
        "max_steps_per_epoch": "training.max_steps",
        "optimizer": "training.optim",
        "optimizer.lr": "training.learning_rate",
        "optimizer.weight_decay": "training.weight_decay",
        "lr_scheduler": "training.lr_scheduler_type",
        "lr_scheduler.num_warmup_steps": "training.warmup_steps",
        "loss": _KERNELS,
        "clip_grad_norm": "training.max_grad_norm",
        "compile": _KERNELS,
        "device": "model.device",
        "metric_logger": "logging",
        "log_every_n_steps": "training.logging_steps",
        "log_peak_memory_stats": _NONE,
        "enable_activation_checkpointing": "training.gradient_checkpointing",
        "enable_activation_offloading": "memory.budget_gib",
        "profiler": _NONE,
    },
}
_EVERY = {key: ours for keys in _KEYS.values() for key, ours in keys.items()}
# Keys that a recipe of ours never has at its top, and that settle whose it is.
_SIGNS: Mapping[str, str] = {
    **dict.fromkeys(("base_model", "micro_batch_size", "sequence_len", "adapter"), "axolotl"),
    **dict.fromkeys(("finetuning_type", "cutoff_len", "stage", "lora_target", "template"), "LLaMA-Factory"),
    **dict.fromkeys(("checkpointer", "metric_logger"), "torchtune"),
    **dict.fromkeys(("model_name_or_path", "dataset_name", "max_seq_length"), "trl"),
}
_ENOUGH = 2


def foreign_recipe(values: Mapping[str, Any], sections: frozenset[str], where: str) -> FinetuneError | None:
    """What to write instead of another tool's recipe, key by key; None for a recipe that is ours.

    Args:
        values: the whole document.
        sections: names of our sections.
    """
    own = [key for key in values if key in sections and "_component_" not in _keys_in(values[key])]
    strange = [key for key in values if key not in own]
    tools = [_SIGNS[key] for key in strange if key in _SIGNS]
    if len([key for key in strange if _ours(key) or key in _SIGNS]) < _ENOUGH or not tools:
        return None
    tool = max(set(tools), key=tools.count)
    lines = [
        f"    {key}: {_ours(key, tool) or f'{_NONE}: there is nothing like it here'}" for key in _paths(values, strange)
    ]
    return FinetuneError(
        f"this is a recipe of {'TRL' if tool == 'trl' else tool}; the same run has other keys here",
        where=where,
        allowed=f"sections {', '.join(sorted(sections))}",
        fix="\n".join(["start from `finetune recipe list`, and put each value where its key goes:", *lines]),
    )


def _paths(values: Mapping[str, Any], keys: list[str]) -> Iterator[str]:
    """The keys, and below a section or the items of a list those that the table knows."""
    for key in keys:
        inner = [f"{key}.{name}" for name in _keys_in(values[key]) if f"{key}.{name}" in _EVERY]
        yield from inner or [key]


def _keys_in(value: Any) -> list[str]:
    """Keys of a mapping, or of the first item of a list."""
    first = value[0] if isinstance(value, list) and value else value
    return list(first) if isinstance(first, dict) else []


def _ours(key: str, tool: str = "") -> str | None:
    if named := _KEYS.get(tool, {}).get(key) or OWNERS.get(key) or _EVERY.get(key):
        return named
    field = RENAMED.get(key, key)
    if field in open_fields():
        return f"training.{field}"
    return f"{_NONE}: {reason}" if (reason := refusal(key)) else None
