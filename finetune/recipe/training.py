"""The `training` section: what passes through to TRL's `SFTConfig`, our defaults, and what it must not say.

A field of `SFTConfig` that another section decides is refused with the name of that section's key, so that no
value has two homes. Names from TRL's command line and from older releases lead to their place here. Types,
choices and lower bounds are checked now, because TRL would find them after the model is loaded, if at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune.recipe.faults import Fault, nearest
from finetune.recipe.training_fields import Accepts, TrainingField, installed_releases, training_fields
from finetune.values import KeyPath, shown

# On top of TRL's defaults. TRL's lr of 2e-5 is for full fine-tuning; seed and logging_steps are TRL's, made visible.
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "gradient_checkpointing": "auto",
    "seed": 42,
    "logging_steps": 10,
    # transformers' filter looks at the loss on the host after every step, which keeps the device waiting for the next
    # batch, and hides what a NaN would tell.
    "logging_nan_inf_filter": False,
}

# Fields of SFTConfig that mean something else here: the activation plan does what TRL's switch would do, and no value
# comes from another file.
OURS: Mapping[str, TrainingField] = {
    "gradient_checkpointing": TrainingField(
        "gradient_checkpointing",
        Accepts(("boolean",), ("auto", "full", "none")),
        "auto",
        "What the backward pass computes again instead of keeping it. full: every layer (least memory). none: nothing. "
        "auto: only what does not fit into the memory that `memory.budget_gib` allows, planned before the first step. "
        "The gradients are the same. true means full, false means none.",
    ),
    "accelerator_config": TrainingField(
        "accelerator_config",
        Accepts(("object", "null")),
        None,
        "Keys of accelerate's AcceleratorConfig, such as split_batches. TRL also takes a JSON file; a recipe "
        "says everything itself.",
    ),
}
_CHECKPOINTING = {True: "full", False: "none"}

# Name -> the key of a recipe that decides it. Not all are fields of SFTConfig: `trl sft` has the others.
OWNERS: Mapping[str, str] = {
    "output_dir": "output.dir",
    "report_to": "logging.wandb",
    "run_name": "logging.run_name",
    "project": "logging.project",
    "router_aux_loss_coef": "router.balance_coef",
    "use_cpu": "model.device",
    "model_init_kwargs": "model",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "use_liger_kernel": "model.fused_layers",
    "liger_kernel_config": "model.fused_layers",
    "chat_template_path": "data.template",
    "dataset_text_field": "data.format",
    "dataset_name": "data.train",
    "dataset_train_split": "data.train_split",
    "dataset_test_split": "data.eval_split",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_config", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"),
        "quantization.experts",
    ),
    "use_bnb_nested_quant": "quantization.experts",
    "use_peft": "trainable.method",
    "peft_config": "trainable.lora",
    "lora_r": "trainable.lora.r",
    "lora_alpha": "trainable.lora.alpha",
    "lora_dropout": "trainable.lora.dropout",
    "lora_target_modules": "trainable.lora.target_modules",
    "use_rslora": "trainable.lora.use_rslora",
    "use_dora": "trainable.lora.use_dora",
}

# Name, or prefix ending in "*" -> why no recipe sets it.
REFUSED: Mapping[str, str] = {
    "eos_token": "the tokenizer at `model.path` decides it",
    "pad_token": "the tokenizer at `model.path` decides it",
    "assistant_only_loss": "`data` supervises the assistant's turns and nothing else",
    "completion_only_loss": "`data` supervises the assistant's turns and nothing else",
    "dataset_kwargs": "`data` hands the trainer finished examples",
    "push_to_hub*": "a run writes to `output.dir` only; upload what you keep afterwards",
    "hub_*": "a run writes to `output.dir` only; upload what you keep afterwards",
    "trackio_*": "metrics go to a JSON-lines file and, by `logging.trackio`, to trackio's database on this machine",
    "trust_remote_code": "the supported models need no code from the hub, and none is run",
    "parallelism_config": "it comes from `accelerate launch --config_file`",
    "local_rank": "the launcher sets it",
    "activation_checkpointing": "it is `training.gradient_checkpointing`: auto, full or none",
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        "`training.gradient_checkpointing` and `memory.budget_gib` decide which layers are recomputed, "
        "and it is never reentrant",
    ),
    "resume_from_checkpoint": "`SFTTrainer` does not read it; resuming is asked for on the command line",
    "do_train": "`SFTTrainer` does not read it",
    "do_eval": "`SFTTrainer` does not read it; see `training.eval_strategy`",
    "do_predict": "`SFTTrainer` does not read it",
}

# Earlier names, for the field that now does it.
RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # takes a ratio when below 1
    "group_by_length": "train_sampling_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}

_AT_LEAST: Mapping[str, int] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_length", "dataset_num_proc", "torch_empty_cache_steps", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "label_smoothing_factor"), 0),
    **dict.fromkeys(("num_train_epochs", "warmup_steps", "logging_steps", "eval_steps", "save_steps", "eval_delay"), 0),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers"), 0),
}


def open_fields() -> dict[str, TrainingField]:
    """The fields of the installed `SFTConfig` that a recipe may set, with our meaning where it differs."""
    return {
        name: OURS.get(name, field)
        for name, field in training_fields().items()
        if name not in OWNERS and not refusal(name)
    }


def check_training(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The section with our defaults and with numbers as numbers, and every fault found in it."""
    fields, faults = open_fields(), []
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = fields.get(name)
        if field is None:
            faults.append(_unknown(name, fields))
            continue
        values[name] = field.accepts.convert(value)
        fault = _value_fault(name, values[name], field.accepts)
        if fault is not None:
            faults.append(fault)
    if isinstance(values.get("gradient_checkpointing"), bool):
        values["gradient_checkpointing"] = _CHECKPOINTING[values["gradient_checkpointing"]]
    if values.get("bf16") is True and values.get("fp16") is True:
        faults.append(_fault("fp16", "`bf16` and `fp16` are both true", fix="keep one; bf16 needs no loss scaling"))
    return {**values, **{name: value for name, value in DEFAULTS.items() if name not in values}}, faults


def training_schema() -> dict[str, Any]:
    """JSON Schema of the section."""
    properties = {}
    for name, field in open_fields().items():
        least = {"minimum": _AT_LEAST[name]} if name in _AT_LEAST else {}
        help_text = {"description": field.help} if field.help else {}
        default = {"default": DEFAULTS.get(name, field.default)}
        properties[name] = field.accepts.json_schema() | least | help_text | default
    made_of = ", ".join(f"{name} {version}" for name, version in installed_releases().items())
    return {"type": "object", "$comment": made_of, "additionalProperties": False, "properties": properties}


def _value_fault(name: str, value: Any, accepts: Accepts) -> Fault | None:
    if not accepts.takes(value):
        whole = isinstance(value, float) and value.is_integer() and accepts.takes(int(value))
        spelled = [choice for choice in accepts.choices if isinstance(choice, str)]
        close = nearest(value, [*spelled, *(("true", "false") if "boolean" in accepts.types else ())])
        fix = f"write `{int(value)}`" if whole else f"write `{close}`" if close else None
        return _fault(name, f"`training.{name}` cannot be {shown(value)}", allowed=accepts.describe(), fix=fix)
    if isinstance(value, int | float) and value < _AT_LEAST.get(name, -math.inf):
        return _fault(name, f"`training.{name}` cannot be {shown(value)}", allowed=f"{_AT_LEAST[name]} or more")
    return None


def _unknown(name: str, fields: Mapping[str, TrainingField]) -> Fault:
    if name in OWNERS:
        owner = OWNERS[name]
        return _fault(name, f"`{name}` is decided by `{owner}`, not under `training`", fix=f"set `{owner}` instead")
    reason = refusal(name)
    if reason is not None:
        return _fault(name, f"`training.{name}` cannot be set in a recipe: {reason}", fix="remove it")
    close = RENAMED.get(name) or nearest(name, fields)
    return _fault(
        name,
        f"unknown key `{name}` in `training`",
        allowed="fields of TRL's SFTConfig (`finetune recipe schema` lists them)",
        fix=f"write `{close}`" if close else "remove it",
    )


def refusal(name: str) -> str | None:
    for pattern, reason in REFUSED.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def _fault(name: str, what: str, *, allowed: str | None = None, fix: str | None = None) -> Fault:
    path: KeyPath = ("training", name)
    return Fault(path, what, allowed, fix)
