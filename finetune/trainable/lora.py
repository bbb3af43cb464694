"""LoRA on the attention of every layer, and the routers in full where they are asked for; nothing else. A PEFT adapter
that stock `peft` loads.

Targets are the suffixes `self_attn.q_proj`, not a regular expression, because PEFT resolves a regular expression on a
Mixtral back to bare leaf names. Routers that train are PEFT's `modules_to_save`: a float32 copy beside each original,
which stays for the base with the adapter switched off.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.arch import ATTENTION_PROJECTIONS, ROUTER, MoeArch, is_router, role_of, why_no_lora
from finetune.checkpoint import blamed_on, read_adapter_config
from finetune.errors import AdapterError
from finetune.trainable.files import (
    LORA_CONFIG,
    LORA_TENSORS,
    Shapes,
    read_shapes,
    require_file,
    require_same,
    writing,
)
from finetune.trainable.lora_layers import register_lora_layers
from finetune.trainable.masters import trainable_count

# What an adapter may name as `modules_to_save`: both are exactly the routers of the supported models.
_ROUTERS = ([ROUTER], [ROUTER.rsplit(".", 1)[-1]])
# Settings of a LoRA adapter that would reach beyond, or shape unevenly, plain LoRA on every layer's attention.
_PLAIN_LORA_ONLY = (
    "target_parameters",
    "layers_to_transform",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "lora_bias",
)


def check_targets(names: Sequence[str], *, where: str = "trainable.lora.target_modules") -> tuple[str, ...]:
    """The targets in order without repeats.

    Raises:
        AdapterError: one is not an attention projection (with the reason), or there is none.
    """
    targets = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    allowed = ", ".join(ATTENTION_PROJECTIONS)
    if not targets:
        raise AdapterError("no target module is named, so nothing would train", where=where, allowed=allowed)
    for target in targets:
        if (refusal := why_no_lora(target)) is not None:
            raise AdapterError(refusal.what, where=where, allowed=allowed, fix=refusal.fix)
    return targets


def add_attention_lora(
    model: nn.Module,
    arch: MoeArch,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    use_rslora: bool = False,
    use_dora: bool = False,
    router: bool = False,
) -> PeftModel:
    """Puts LoRA on the attention of every layer and freezes the rest; the model is changed in place and wrapped.

    Args:
        router: the routers train as well, in full.

    Raises:
        AdapterError: a target is an expert, the router, embedding or head, unknown, or the list is empty.
    """
    targets = check_targets(target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[f"self_attn.{name}" for name in targets],
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=[ROUTER] if router else None,
    )
    expected = _lora_shapes(model, arch, r=r, targets=targets, dora=use_dora, router=router)
    peft_model = get_peft_model(model, register_lora_layers(config))
    _keep_routers_fp32(peft_model, {})
    _assert_lora(peft_model, expected, arch.lora_params(r, targets, dora=use_dora, router=router))
    return peft_model


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
            _keep_routers_fp32(peft_model, {name: file.get_tensor(name) for name in saved.shapes if is_router(name)})
        _assert_lora(peft_model, saved.shapes, saved.count)
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
    require_file(folder / LORA_CONFIG)
    config = read_adapter_config(folder / LORA_CONFIG)
    _require_plain_lora(config, folder / LORA_CONFIG)
    found = read_shapes(folder / LORA_TENSORS)
    targets = _saved_targets(config, found, where=str(folder / LORA_CONFIG))
    r, dora, router = config["r"], bool(config.get("use_dora")), bool(config.get("modules_to_save"))
    expected = _lora_shapes(model, arch, r=r, targets=targets, dora=dora, router=router)
    require_same(
        found,
        expected,
        folder / LORA_TENSORS,
        what=f"the adapter does not fit this model at r={r}",
        fix=f"load it onto the base it was trained on ({config.get('base_model_name_or_path')})",
    )
    count = arch.lora_params(r, targets, dora=dora, router=router)
    with blamed_on(folder / LORA_CONFIG, kind=AdapterError):
        saved = register_lora_layers(LoraConfig.from_pretrained(str(folder)))
        matched = {path for path, _ in model.named_modules() if check_target_module_exists(saved, path)}
    held = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found if ".lora_" in name}
    if matched != held:
        raise AdapterError(
            f"target_modules names {len(matched)} modules of this model, and the weights are those of {len(held)}",
            where=str(folder / LORA_CONFIG),
            fix="use the adapter folder as it was saved",
        )
    return SavedLora(saved, expected, count)


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


def _lora_shapes(
    model: nn.Module, arch: MoeArch, *, r: int, targets: Sequence[str], dora: bool, router: bool
) -> Shapes:
    """Names and shapes of the tensors in `adapter_model.safetensors` for this base.

    Shapes come from the config because a 4-bit weight does not show its own.
    """
    shapes: Shapes = {}
    for path, _ in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if router and path.endswith(f".{ROUTER}"):
            shapes[f"base_model.model.{path}.weight"] = (arch.experts, arch.hidden)
        if leaf in targets and role_of(f"{path}.weight") == "attention":
            out_features, in_features = arch.attention_shapes()[leaf]
            prefix = f"base_model.model.{path}"
            shapes[f"{prefix}.lora_A.weight"] = (r, in_features)
            shapes[f"{prefix}.lora_B.weight"] = (out_features, r)
            if dora:
                shapes[f"{prefix}.lora_magnitude_vector"] = (out_features,)
    return shapes


def _assert_lora(model: PeftModel, expected: Shapes, count: int) -> None:
    """Exactly the expected tensors train, in fp32, and their number is the formula's."""
    trained = {_saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    assert shapes == expected, sorted(set(shapes) ^ set(expected))[:3]
    assert all(p.dtype == torch.float32 for p in trained.values()), "LoRA weights must be fp32"
    assert trainable_count(model) == count, f"{trainable_count(model)} LoRA parameters, the formula says {count}"


def _saved_name(name: str) -> str:
    """What PEFT calls a parameter of the adapter in its file."""
    name = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
    return name.replace(f".{ROUTER}.modules_to_save.", f".{ROUTER}.")


def _keep_routers_fp32(model: PeftModel, values: Mapping[str, Tensor]) -> None:
    """Makes the routers that train float32 masters, with `values` by their names in the adapter's file."""
    for path, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.requires_grad and is_router(f"{path}.weight")]
        for weight in weights:
            value = values.get(_saved_name(f"{path}.weight"), weight.data)
            # copy: on a CPU what was read is a view into the mapped file, and training writes to it.
            weight.data = value.to(weight.device, torch.float32, copy=True)
            module.register_forward_pre_hook(_in_the_weights_dtype)


def _in_the_weights_dtype(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Outside autocast a 16-bit hidden state does not multiply a float32 master."""
    (x,) = args
    return None if torch.is_autocast_enabled(x.device.type) else (x.to(router.get_parameter("weight").dtype),)


def _saved_targets(config: Mapping[str, Any], found: Shapes, *, where: str) -> tuple[str, ...]:
    """Projections of an adapter: its list, or what its tensors are named after when it holds a regular expression."""
    listed = config.get("target_modules")
    paths = listed if isinstance(listed, list) else [name.split(".lora_")[0] for name in found if ".lora_" in name]
    return check_targets(sorted({str(path).rsplit(".", 1)[-1] for path in paths}), where=where)


def _require_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    faults = [f"{key} is {config[key]!r}" for key in _PLAIN_LORA_ONLY if config.get(key)]
    if config.get("modules_to_save") and config["modules_to_save"] not in _ROUTERS:
        faults.append(f"modules_to_save is {config['modules_to_save']!r}")
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {config['bias']!r}")
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')!r}")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        faults.append(f"r is {config.get('r')!r}")
    if faults:
        raise AdapterError(
            f"the adapter is not LoRA of one rank on the attention: {', '.join(faults)}",
            where=str(path),
            allowed=f"peft_type LORA on {', '.join(ATTENTION_PROJECTIONS)} of every layer, DoRA and rsLoRA included; "
            f"modules_to_save of {ROUTER} only",
            fix="train the adapter without these settings",
        )
