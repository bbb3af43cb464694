"""Refuses weights that are infinite or no number: one of them makes every answer no number, and none is said later.

Quantizing reads every weight anyway, and a NaN reaches the mean of its matrix's scales. So a quantized matrix is known
by that one number, and only what is not quantized is looked through: a pass over 3% of Mixtral's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from finetune.checkpoint import incomplete, read_tensor_infos, shard_files
from finetune.errors import ModelError
from finetune.moe.arch import EXPERT_PROJECTIONS, hub_expert_names, hub_name
from finetune.moe.experts import QuantizedExperts


def is_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are; reads once and keeps nothing."""
    return all(bool(torch.isfinite(torch.stack(tensor.aminmax())).all()) for tensor in tensors if tensor.numel())


def require_finite(model: PreTrainedModel) -> None:
    """Looks at every parameter of a loaded model, the experts' scales and the state of 4-bit layers.

    Raises:
        ModelError: names the tensors, and the files where they lie; or the scales of a 4-bit layer are missing.
    """
    folder, kind = Path(model.config.name_or_path or ""), model.config.model_type
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for projection in EXPERT_PROJECTIONS:
                floats = {
                    key: tensor
                    for key, tensor in module.named_parameters(recurse=False)
                    if key.startswith(f"{projection}_") and tensor.is_floating_point() and not tensor.is_meta
                }
                if not is_finite(*floats.values()):
                    finite = [tensor.isfinite().view(len(tensor), -1).all(1) for tensor in floats.values()]
                    expert = int((~torch.stack(finite).all(0)).nonzero()[0])
                    stored = hub_expert_names(kind, int(name.split(".")[2]), expert, projection)
                    raise not_finite(
                        f"{name}.{projection} of expert {expert}",
                        folder,
                        [*stored, f"{name}.{projection}", *(f"{name}.{key}" for key in floats)],
                    )
            continue
        for key, parameter in module.named_parameters(recurse=False):
            values: list[Tensor] = [parameter] if parameter.is_floating_point() and not parameter.is_meta else []
            if isinstance(module, Linear4bit) and key == "weight":
                state: Any = parameter.quant_state if isinstance(parameter, Params4bit) else None
                if state is not None and state.state2 is None:
                    # bitsandbytes would take the scales' 8-bit codes for the scales.
                    raise incomplete([f"{name}.weight.nested_absmax"])
                values = [] if state is None else [state.offset, state.state2.absmax]
            if not is_finite(*values):
                full = f"{name}.{key}"
                raise not_finite(full, folder, [full, hub_name(kind, full), f"{full}.nested_absmax"])


def not_finite(name: str, folder: Path, stored: Sequence[str]) -> ModelError:
    """The error for a weight that is not finite.

    Args:
        stored: by what names a file may hold it.
    """
    places = [f"{file.name}: {tensor}" for file, tensor in _not_finite_in(folder, set(stored))]
    if places or not folder.is_dir():
        what = f"the checkpoint holds a weight that is infinite or no number (NaN): {name}"
    else:
        what = f"the checkpoint holds a weight that is too large for the dtype it is loaded in: {name}"
    return ModelError(
        what,
        where=f"{folder}: {', '.join(places) or name}",
        allowed="numbers",
        fix="download or copy the checkpoint again, or use one from before it diverged; "
        "a model with such a weight answers nothing",
    )


def _not_finite_in(folder: Path, names: set[str]) -> Iterable[tuple[Path, str]]:
    for file in shard_files(folder) if folder.is_dir() else []:
        held = [info.name for info in read_tensor_infos(file) if info.name in names]
        if held:
            with safe_open(file, framework="pt") as tensors:
                for name in held:
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not is_finite(tensor):
                        yield file, name
