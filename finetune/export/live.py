"""How far a merged folder is from the live adapter, measured on held-out conversations with the folder's own weights.

The live model is loaded once. For every row it runs as it is, and again with all that was tuned replaced by what the
merged folder holds; the experts are the same bytes in both. So no second model needs memory, and what is compared is
what was written, not what should have been.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from finetune.arch import role_of
from finetune.evaluate import Fidelity, Row, fidelity, swapped
from finetune.export.tensors import Tensors
from finetune.model import LoadedModel
from finetune.runfolder import write_json

FIDELITY_FILE = "fidelity.json"
_LORA_PREFIX = "base_model.model."


def measure_fidelity(
    live: LoadedModel, merged: Path, rows: Sequence[Row], *, adapter: Path, held_out: str | None
) -> Fidelity:
    """Compares a live adapter or non-MoE tuning with its merged folder, and writes fidelity.json into that.

    Args:
        rows: supervised rows, and `held_out` what they are taken from.
    """
    tensors = Tensors.of_model(merged)
    modules, values = _written_modules(live, tensors), _written_values(live.model, tensors)

    @contextlib.contextmanager
    def as_written() -> Iterator[None]:
        with swapped(live.model, modules), _replaced(values):
            yield

    layers, top_k = live.arch.layers, live.arch.top_k
    report = fidelity(live.model, as_written, rows, live.device, layers=layers, top_k=top_k)
    about = {"format": "nf4", "merged_from": str(adapter), "base": live.base.path, "held_out": held_out}
    write_json(merged / FIDELITY_FILE, {**about, "fidelity": report.to_dict()})
    return report


def _written_modules(live: LoadedModel, tensors: Tensors) -> dict[str, nn.Module]:
    """The plain layer, by path, in the place of every LoRA layer, of every 4-bit layer that LoRA was not put on (the
    folder holds it in 16 bits too), and of every router that PEFT trained a copy of.
    """
    modules: dict[str, nn.Module] = {}
    for path, module in live.model.named_modules():
        of_lora = path.endswith(".base_layer")
        if of_lora or not isinstance(module, (LoraLayer, Linear4bit, ModulesToSaveWrapper)):
            continue
        weight = tensors.read(f"{path.removeprefix(_LORA_PREFIX)}.weight")
        if not isinstance(module, ModulesToSaveWrapper):
            plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            dtype = live.model.dtype
        else:
            plain = copy.deepcopy(module.original_module)
            dtype = plain.weight.dtype
        plain.weight = nn.Parameter(weight.to(live.device, dtype), requires_grad=False)
        modules[path] = plain
    return modules


def _written_values(model: nn.Module, tensors: Tensors) -> dict[nn.Parameter, Tensor]:
    """What the folder holds for every other parameter, where it differs: a non-MoE tuning's."""
    values = {}
    for name, parameter in model.named_parameters():
        written = name.removeprefix(_LORA_PREFIX)
        if role_of(name) != "experts" and parameter.is_floating_point() and written in tensors:
            value = tensors.read(written).to(parameter.device, parameter.dtype)
            if not torch.equal(value, parameter.data):
                values[parameter] = value
    return values


@contextlib.contextmanager
def _replaced(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Gives parameters other values while it lasts; what is tied stays tied."""
    originals = {parameter: parameter.data for parameter in values}
    for parameter, value in values.items():
        parameter.data = value
    try:
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original
