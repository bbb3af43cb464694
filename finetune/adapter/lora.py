"""LoRA adapters in their folder: saved so that stock `peft` loads them, and checked in full before they are put on a
base.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from finetune.adapter.attention_lora import assert_lora, check_targets, keep_routers_fp32, lora_shapes
from finetune.adapter.files import LORA_CONFIG, LORA_TENSORS, Shapes, read_shapes, require_same, writing
from finetune.adapter.lora_layers import register_lora_layers
from finetune.adapter.settings import LoraSettings, read_lora_settings
from finetune.checkpoint import blamed_on
from finetune.errors import AdapterError
from finetune.moe import MoeArch, is_router


def load_adapter(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Loads a LoRA adapter onto the base it was trained on; nothing of the model is touched before all checks passed.

    Raises:
        AdapterError: a file is missing or corrupt, the adapter is no plain attention LoRA, or its tensors do not fit.
    """
    folder = Path(folder)
    saved = read_saved(model, folder)
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, config=saved.config)
    if is_trainable:
        with safe_open(folder / LORA_TENSORS, framework="pt") as file:
            # PEFT has rounded them to the base's dtype.
            keep_routers_fp32(peft_model, {name: file.get_tensor(name) for name in saved.shapes if is_router(name)})
        assert_lora(peft_model, saved.shapes, saved.count)
    return peft_model


def add_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    """Loads several adapters of one base side by side, by name, for inference; the first is the active one.

    Raises:
        AdapterError: as `load_adapter`, before anything of the model is touched.
    """
    saved = {name: read_saved(model, folder) for name, folder in folders.items()}
    (first, folder), *others = folders.items()
    peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=first, config=saved[first].config)
    for name, folder in others:
        peft_model.load_adapter(str(folder), adapter_name=name, config=saved[name].config)
    return peft_model.eval()


@dataclass(frozen=True)
class SavedLora:
    """An adapter in a folder that fits the model: what PEFT is to build, its tensors, and how many numbers they are."""

    config: LoraConfig
    shapes: Shapes
    count: int


def read_saved(model: PreTrainedModel, folder: Path) -> SavedLora:
    """Checks a saved adapter against a base, which may be on the meta device; nothing of the model is touched.

    Raises:
        AdapterError: as `load_adapter`.
    """
    arch = MoeArch.from_config(model.config.to_dict())
    settings = read_lora_settings(folder)
    found = read_shapes(folder / LORA_TENSORS)
    targets = projections_of(settings, found, where=str(folder / LORA_CONFIG))
    r, dora, router = settings.r, settings.dora, settings.router
    expected = lora_shapes(model, arch, r=r, targets=targets, dora=dora, router=router)
    require_same(
        found,
        expected,
        folder / LORA_TENSORS,
        what=f"the adapter does not fit this model at r={r}",
        fix=f"load it onto the base it was trained on ({settings.base})",
    )
    # Built anew: how A and B once began would run again in PEFT, and is no matter now.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        exclude_modules=settings.excluded,
        use_rslora=settings.rslora,
        use_dora=dora,
        modules_to_save=settings.modules_to_save,
    )
    with blamed_on(folder / LORA_CONFIG, kind=AdapterError):
        matched = {path for path, _ in model.named_modules() if check_target_module_exists(config, path)}
    held = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found if ".lora_" in name}
    if matched != held:
        raise AdapterError(
            f"target_modules names {len(matched)} modules of this model, and the weights are those of {len(held)}",
            where=str(folder / LORA_CONFIG),
            fix="use the adapter folder as it was saved",
        )
    return SavedLora(register_lora_layers(config), expected, arch.lora_params(r, targets, dora=dora, router=router))


def save_adapter(model: PeftModel, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """`save_pretrained` into a neighbouring temporary folder, then one rename a file, the config last.

    Args:
        tensors: what `trained_tensors` gathered, where the model's own are sharded.
    """
    folder = Path(folder)
    with writing(folder / LORA_TENSORS), tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as scratch:
        # False: the vocabulary never changes here, and "auto" may ask the hub for the base's config.
        model.save_pretrained(scratch, save_embedding_layers=False, state_dict=tensors)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == LORA_CONFIG):
            os.replace(file, folder / file.name)


def projections_of(settings: LoraSettings, found: Shapes, *, where: str) -> tuple[str, ...]:
    """Projections of an adapter: its list, or what its tensors are named after when it holds a regular expression."""
    listed = settings.targets
    paths = listed if isinstance(listed, list) else [name.split(".lora_")[0] for name in found if ".lora_" in name]
    return check_targets(sorted({str(path).rsplit(".", 1)[-1] for path in paths}), where=where)
