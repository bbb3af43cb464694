"""LoRA on the attention of every layer, and the routers in full where they are asked for; nothing else. A PEFT adapter
that stock `peft` loads: put on, saved, checked in full before it is put on a base, and computed.

Targets are the suffixes `self_attn.q_proj`, not a regular expression, because PEFT resolves a regular expression on a
Mixtral back to bare leaf names. Routers that train are PEFT's `modules_to_save`: a float32 copy beside each original,
which stays for the base with the adapter switched off.

PEFT takes layer classes of one's own by a mapping in its config. Parameters, names, saving, merging and everything
unusual (dropout while training, DoRA, several or no active adapters, a merged layer) stay PEFT's: our layers only
replace `forward` for the usual case, by the fused operation of `kernels/lora.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune import private_api
from finetune.adapter.files import LORA_CONFIG, LORA_TENSORS, Shapes, read_shapes, require_same, writing
from finetune.adapter.masters import trainable_count
from finetune.adapter.settings import LoraSettings, read_lora_settings
from finetune.checkpoint import blamed_on
from finetune.errors import AdapterError
from finetune.kernels import Nf4Weights, dequantize_experts, lora_linear, nf4_of_linear
from finetune.moe import ATTENTION_PROJECTIONS, ROUTER, MoeArch, is_router, role_of, why_no_lora


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
    expected = lora_shapes(model, arch, r=r, targets=targets, dora=use_dora, router=router)
    peft_model = get_peft_model(model, register_lora_layers(config))
    keep_routers_fp32(peft_model, {})
    assert_lora(peft_model, expected, arch.lora_params(r, targets, dora=use_dora, router=router))
    return peft_model


def lora_shapes(model: nn.Module, arch: MoeArch, *, r: int, targets: Sequence[str], dora: bool, router: bool) -> Shapes:
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


def assert_lora(model: PeftModel, expected: Shapes, count: int) -> None:
    """Exactly the expected tensors train, in fp32, and their number is the formula's."""
    trained = {saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    assert shapes == expected, sorted(set(shapes) ^ set(expected))[:3]
    assert all(p.dtype == torch.float32 for p in trained.values()), "LoRA weights must be fp32"
    assert trainable_count(model) == count, f"{trainable_count(model)} LoRA parameters, the formula says {count}"


def saved_name(name: str) -> str:
    """What PEFT calls a parameter of the adapter in its file."""
    name = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
    return name.replace(f".{ROUTER}.modules_to_save.", f".{ROUTER}.")


def keep_routers_fp32(model: PeftModel, values: Mapping[str, Tensor]) -> None:
    """Makes the routers that train float32 masters, with `values` by their names in the adapter's file."""
    for path, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.requires_grad and is_router(f"{path}.weight")]
        for weight in weights:
            value = values.get(saved_name(f"{path}.weight"), weight.data)
            # copy: on a CPU what was read is a view into the mapped file, and training writes to it.
            weight.data = value.to(weight.device, torch.float32, copy=True)
            module.register_forward_pre_hook(_in_the_weights_dtype)


def _in_the_weights_dtype(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Outside autocast a 16-bit hidden state does not multiply a float32 master."""
    (x,) = args
    return None if torch.is_autocast_enabled(x.device.type) else (x.to(router.get_parameter("weight").dtype),)


# ---- in a folder -----------------------------------------------------------------------------------------------------


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
        (Path(scratch) / "README.md").unlink()  # an empty form; a run that ends writes its card (export/card.py)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == LORA_CONFIG):
            os.replace(file, folder / file.name)


def projections_of(settings: LoraSettings, found: Shapes, *, where: str) -> tuple[str, ...]:
    """Projections of an adapter: its list, or what its tensors are named after when it holds a regular expression."""
    listed = settings.targets
    paths = listed if isinstance(listed, list) else [name.split(".lora_")[0] for name in found if ".lora_" in name]
    return check_targets(sorted({str(path).rsplit(".", 1)[-1] for path in paths}), where=where)


# ---- the layers ------------------------------------------------------------------------------------------------------


def register_lora_layers(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build these layers for this config; nothing of it is saved with the adapter."""
    private_api.register_lora_layers(config, {Linear4bit: FusedLoraLinear4bit, nn.Linear: FusedLoraLinear})
    return config


class _Fused:
    """`forward` of both layers, before PEFT's own in the method resolution order."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        usual = (
            name in self.lora_A
            and self._readable()
            and not (args or kwargs or self.disable_adapters or self.merged)
            and name not in self.lora_variant
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and self.get_base_layer().bias is None
            and self.lora_B[name].bias is None
        )
        if not usual:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, self._frozen_weight(), a, b, self.scaling[name])


class FusedLoraLinear4bit(_Fused, PeftLinear4bit):
    """LoRA on a bitsandbytes 4-bit layer."""

    def _layer(self) -> Linear4bit:
        layer = self.get_base_layer()
        assert isinstance(layer, Linear4bit), type(layer)
        return layer

    def _readable(self) -> bool:
        # On CPUs with AVX512-BF16, bitsandbytes packs a weight anew when its own layer runs without gradients, and
        # says so by an attribute that it sets only then.
        state: Any = self._layer().weight.quant_state  # type: ignore[attr-defined]  # Params4bit carries it
        return not vars(state).get("packing_format_for_cpu", False)

    _resident: Tensor | None = None

    def keep_dequantized(self, dtype: torch.dtype) -> None:
        """Dequantizes the frozen weight once and for all: the same values, for 2 bytes a weight instead of passes.

        2.5 GiB for Mixtral 8x7B. A step without checkpointing launches 128 dequantizations instead of 381, 77.5 ms of
        them instead of 80.0 (H100, 2 x 1024 tokens, `finetune bench train`).
        """
        self._resident = dequantize_experts(nf4_of_linear(self._layer()), dtype)[0]

    def _frozen_weight(self) -> Nf4Weights | Tensor:
        return nf4_of_linear(self._layer()) if self._resident is None else self._resident


class FusedLoraLinear(_Fused, PeftLinear):
    """LoRA on a 16- or 32-bit layer."""

    def _readable(self) -> bool:
        return True

    def _frozen_weight(self) -> Tensor:
        layer = self.get_base_layer()
        assert isinstance(layer, nn.Linear), type(layer)
        return layer.weight.detach()
