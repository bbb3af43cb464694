"""What `adapter_config.json` says, read in one place, and refused in one message where this toolkit would answer
otherwise than stock PEFT does.

Every field of PEFT 0.21's LoraConfig has its verdict here. Plain LoRA is W + s B A on every layer, all of the time.
What only says how A and B began is plain too (`gaussian`, `eva`, `orthogonal`, `mica`): the saved tensors replace it.
PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ changed the base's weights when training began, and such an adapter is not an
update of the base as it lies on the disk; aLoRA acts only after its invocation tokens; the rest of the refused ones
compute something else than W + s B A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapter.files import LORA_CONFIG, require_file
from finetune.checkpoint import read_adapter_config
from finetune.errors import AdapterError
from finetune.moe import ATTENTION_PROJECTIONS, ROUTER

# How A and B may have begun; everything else that PEFT knows changes the base.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What an adapter may name as `modules_to_save`: both are exactly the routers of the supported models.
_ROUTERS = ([ROUTER], [ROUTER.rsplit(".", 1)[-1]])
# Fields that are read below, and fields that change nothing of what an adapter computes once it is trained: the
# configurations of EVA, CorDA, LoRA-GA and LoftQ only matter with the `init_lora_weights` of that name. Any other field
# that says something is refused, those of a later PEFT too.
READ_FIELDS: tuple[str, ...] = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
READ_FIELDS += ("modules_to_save", "peft_type", "task_type", "bias", "init_lora_weights", "revision")
READ_FIELDS += ("base_model_name_or_path", "exclude_modules")
IDLE_FIELDS: tuple[str, ...] = ("auto_mapping", "peft_version", "inference_mode", "layers_pattern")
IDLE_FIELDS += ("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
IDLE_FIELDS += ("ensure_weight_tying", "runtime_config")


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter's own account of itself.

    Attributes:
        scaling: s of W + s B A.
        targets, excluded: `target_modules` and `exclude_modules` as written, a list or a regular expression.
        modules_to_save: the routers, where they trained in full.
        base: `base_model_name_or_path`, None where it says nothing.
    """

    r: int
    alpha: float
    scaling: float
    dora: bool
    rslora: bool
    targets: list[str] | str
    excluded: list[str] | str | None
    modules_to_save: list[str] | None
    dropout: float
    base: str | None
    revision: str | None

    @property
    def router(self) -> bool:
        return self.modules_to_save is not None


def read_lora_settings(folder: Path) -> LoraSettings:
    """Reads `adapter_config.json`.

    Raises:
        AdapterError: the file is missing or damaged, or the adapter is not LoRA of one rank on the attention; names
            every setting that is in the way.
    """
    path = folder / LORA_CONFIG
    require_file(path)
    config = read_adapter_config(path)
    _require_plain(config, path)
    r, alpha, rslora = config["r"], config.get("lora_alpha", 8), bool(config.get("use_rslora"))
    return LoraSettings(
        r=r,
        alpha=alpha,
        scaling=float(alpha / (math.sqrt(r) if rslora else r)),
        dora=bool(config.get("use_dora")),
        rslora=rslora,
        targets=config.get("target_modules") or [],
        excluded=config.get("exclude_modules") or None,
        modules_to_save=config.get("modules_to_save") or None,
        dropout=config.get("lora_dropout") or 0.0,
        base=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
    )


def _require_plain(config: Mapping[str, Any], path: Path) -> None:
    others = {key: value for key, value in config.items() if value and key not in (*READ_FIELDS, *IDLE_FIELDS)}
    faults = [f"{key} is {value!r:.80}" for key, value in others.items()]
    if config.get("modules_to_save") and config["modules_to_save"] not in _ROUTERS:
        faults.append(f"modules_to_save is {config['modules_to_save']!r:.80}")
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {config['bias']!r:.80}")
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')!r:.80}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"task_type is {config['task_type']!r:.80}")
    begun = config.get("init_lora_weights", True)
    if begun not in _PLAIN_BEGINNINGS:
        faults.append(f"init_lora_weights is {begun!r:.80}, which changes the base's own weights")
    if faults:
        raise AdapterError(
            f"the adapter is not LoRA of one rank on the attention: {', '.join(faults)}",
            where=str(path),
            allowed=f"peft_type LORA on {', '.join(ATTENTION_PROJECTIONS)} of every layer, DoRA and rsLoRA included; "
            f"modules_to_save of {ROUTER} only; init_lora_weights true, gaussian, eva, orthogonal or mica",
            fix="train the adapter without these settings, or convert it with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...) where they changed the base"
            if begun not in _PLAIN_BEGINNINGS
            else "train the adapter without these settings",
        )
