"""LoRA on the attention of every layer, and the routers in full where they are asked for; nothing else. A PEFT adapter
that stock `peft` loads.

Targets are the suffixes `self_attn.q_proj`, not a regular expression, because PEFT resolves a regular expression on a
Mixtral back to bare leaf names. Routers that train are PEFT's `modules_to_save`: a float32 copy beside each original,
which stays for the base with the adapter switched off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from finetune.adapter.lora_layers import register_lora_layers
from finetune.adapter.masters import trainable_count
from finetune.errors import AdapterError
from finetune.moe import ATTENTION_PROJECTIONS, ROUTER, MoeArch, is_router, role_of, why_no_lora

Shapes = dict[str, tuple[int, ...]]


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
