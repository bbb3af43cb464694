"""Everything but the experts trained, as fp32 masters, and kept in its folder: one safetensors file under the
parameters' names in transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.adapter.files import NON_MOE_CONFIG, NON_MOE_TENSORS, Shapes, require_file, require_same, writing
from finetune.adapter.masters import trainable_count, trained_tensors
from finetune.checkpoint import NonMoeFile, NotJson, parse_json, read_header
from finetune.errors import AdapterError, FinetuneError
from finetune.moe import MoeArch, role_of
from finetune.values import check_object


def unfreeze_non_moe(model: nn.Module, arch: MoeArch, *, router: bool = False) -> None:
    """Attention, norms, embeddings and head train as fp32 masters; experts stay frozen, the router too unless asked.

    The router becomes fp32 either way (exactly, and it is small): the residual stream that it multiplies is fp32 then.

    Raises:
        FinetuneError: the attention is quantized.
    """
    tuned = non_moe_parameters(model, router=router)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in tuned or role_of(name) == "router":
            parameter.data = parameter.data.float()
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    count, expected = trainable_count(model), arch.non_moe_params(router=router)
    assert count == expected, f"{count} parameters train, the formula says {expected}"


def non_moe_parameters(model: nn.Module, *, router: bool) -> dict[str, nn.Parameter]:
    """Parameters outside the experts by name, tied ones once; refuses a quantized attention."""
    roles = {"attention", "norm", "embedding", "head", *(["router"] if router else [])}
    tuned = {name: parameter for name, parameter in model.named_parameters() if role_of(name) in roles}
    quantized = [name for name, parameter in tuned.items() if not parameter.is_floating_point()]
    if quantized:
        raise FinetuneError(
            f"4-bit weights cannot train: {len(quantized)} attention matrices are quantized",
            where=f"quantization.attention, found at {quantized[0]}",
            allowed="quantization.attention must be 16bit for trainable.method: non_moe",
            fix="set quantization.attention: 16bit",
        )
    return tuned


def save_non_moe(
    model: nn.Module, folder: str | Path, *, base: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes every trainable parameter to `non_moe.safetensors`, whole or not at all, and a readable `non_moe.json`.

    Args:
        base: what identifies the base model (path, fingerprint); kept with the tensors and compared by `load_non_moe`.
        tensors: what `trained_tensors` gathered, where the model's own are sharded.
    """
    tensors = {name: t.contiguous() for name, t in (tensors or trained_tensors(model)).items()}
    assert tensors, "nothing trains in this model"
    about = {
        "format": 1,
        "base": dict(base),
        "router": any(role_of(name) == "router" for name in tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    folder = Path(folder)
    with writing(folder / NON_MOE_TENSORS) as scratch:
        # The header carries the same facts, so that the tensors and what is said of them cannot come apart.
        save_file(tensors, scratch, metadata={"format": "pt", "non_moe": json.dumps(about)})
        os.replace(scratch, folder / NON_MOE_TENSORS)
    with writing(folder / NON_MOE_CONFIG) as scratch:
        scratch.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, folder / NON_MOE_CONFIG)


def load_non_moe(
    model: nn.Module,
    folder: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts saved parameters back onto their base; nothing is changed before all checks passed.

    Args:
        base: when given, must equal what `save_non_moe` was told.
        dtype: None keeps the fp32 masters bit for bit (to go on training); a 16-bit type rounds once (to serve).

    Raises:
        AdapterError: a file is missing or corrupt, or it belongs to another base.
        FinetuneError: the attention is quantized.
    """
    path = Path(folder) / NON_MOE_TENSORS
    about, found = read_non_moe(path)
    with safe_open(path, framework="pt") as file:
        fix = f"load it onto the base it was trained on ({about.base})"
        if base is not None and dict(base) != about.base:
            raise AdapterError(f"the tuned weights belong to another base than {dict(base)}", where=str(path), fix=fix)
        tuned = non_moe_parameters(model, router=about.router)
        expected = {name: tuple(parameter.shape) for name, parameter in tuned.items()}
        require_same(found, expected, path, what="the tuned weights do not fit this model", fix=fix)
        for name, parameter in tuned.items():
            tensor = file.get_tensor(name)
            # copy: on a CPU the tensor is a view into the mapped file, and training writes to it.
            parameter.data = tensor.to(device=parameter.device, dtype=dtype or tensor.dtype, copy=True)
    for name, parameter in model.named_parameters():
        if role_of(name) == "router" and name not in tuned:
            parameter.data = parameter.data.to(dtype or torch.float32)


def read_non_moe(path: Path) -> tuple[NonMoeFile, Shapes]:
    """What `non_moe.safetensors` says of itself, and the names and shapes of its tensors.

    Raises:
        AdapterError: it is missing or corrupt, or does not say which base it belongs to.
    """
    require_file(path)
    header = read_header(path, kind=AdapterError)
    if "non_moe" not in header.metadata:
        raise AdapterError("the file does not say which base it belongs to", where=str(path), fix="save it again")
    where = f"{path}: metadata"
    try:
        content = parse_json(header.metadata["non_moe"].encode())
    except (NotJson, UnicodeEncodeError) as error:
        what = f"{path.name} does not say in valid JSON what it holds: {error}"
        raise AdapterError(what, where=where, fix="copy the file again") from None
    fix = "use the file as it was saved; a format of a newer release needs that release: update moe-qlora"
    about = check_object(content, NonMoeFile, kind=AdapterError, name=NON_MOE_CONFIG, where=where, fix=fix)
    return about, {info.name: info.shape for info in header.tensors}
