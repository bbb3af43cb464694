"""Merges what was trained into the attention and leaves the experts' bytes as they are.

The live model computes dequant(W) x + s B A x. Merged, attention is W' = dequant(W) + s B A, summed in float32 and
rounded once to bfloat16, in a 16-bit linear layer; experts, norms and embeddings are untouched, and routers too unless
they were trained: then the trained ones, rounded once, take their place. So the merged model differs from the live
adapter by one rounding. Rounding W' back onto the NF4 grid instead loses most of a small update: at |update| / |W| of
1% only 1% of it survives (PEFT's 4-bit `merge_and_unload`).

DoRA (arXiv 2402.09353, eq. 5) merges as W' = m (W + s B A) / ||W + s B A||, norms over each output's row.

A non-MoE tuning has nothing to add up: its float32 masters are rounded once. The result is a transformers folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.evaluate import Fidelity, Row, fidelity, swapped
from finetune.export.held_out import HeldOut
from finetune.export.serving import write_serving
from finetune.export.source import require_adapter
from finetune.kernels.nf4 import dequantize_linear
from finetune.model import LoadedModel, load
from finetune.quant import Moe4bitConfig, QuantizedExperts, take_census
from finetune.runfolder import require_fresh, require_space, staged, write_json

MERGED_DTYPE = torch.bfloat16
_ADAPTER = "default"


def merge_adapter(
    adapter: Path,
    output: Path,
    *,
    base_path: str | None = None,
    data: str | None = None,
    max_rows: int = 64,
    device: str = "auto",
) -> Fidelity | None:
    """Merges an adapter folder and compares with the live adapter on held-out conversations.

    Args:
        data: conversations to compare on; without, the held-out data of the run that the adapter folder lies in.

    Raises:
        FinetuneError: as `load`, `encode_source` and `merge`.
    """
    require_fresh(output)
    require_adapter(adapter)
    held_out = HeldOut.find(adapter, data)
    loaded = load(str(adapter), base_path=base_path, device=device)
    rows = held_out.rows(loaded.tokenizer, max_rows)

    def describe(folder: Path, report: Fidelity | None) -> None:
        about = {
            "format": "nf4",
            "merged_from": str(adapter),
            "base": loaded.base.path,
            "dtype": f"bfloat16 attention, {loaded.base.experts} experts as they were",
            "held_out": held_out.name,
            "fidelity": None if report is None else report.to_dict(),
        }
        write_json(folder / "fidelity.json", about)
        write_serving(folder, about, name=output.name, chat_template=None)

    return merge(loaded, output, probe=rows, extra_files=describe)


def merge(
    loaded: LoadedModel,
    output: Path,
    *,
    probe: Sequence[Row] = (),
    extra_files: Callable[[Path, Fidelity | None], None] | None = None,
) -> Fidelity | None:
    """Writes the merged model of a live adapter or non-MoE tuning to `output`, whole or not at all.

    Args:
        loaded: a model with its adapter on it; it is used up (the adapter is merged away in memory).
        probe: supervised rows to compare merged and live on; none, no comparison.
        extra_files: writes more files into the folder before it appears under its name.

    Raises:
        OutputError: the folder is not empty, or the disk has no room.
    """
    # Attention grows from 4 to 16 bits.
    needed = take_census(loaded.model).total_bytes + 2 * loaded.arch.attention_params
    require_space(output, needed, what="the merged model")
    with staged(output) as folder:
        linears: dict[str, nn.Linear] = {}
        routers: dict[str, nn.Module] = {}
        if isinstance(loaded.model, PeftModel):
            linears, routers = merged_linears(loaded.model), merged_routers(loaded.model)
        # What watches a router hooks the wrapper, so it is the copy inside that is swapped.
        live = {f"{name}.modules_to_save.{_ADAPTER}": router for name, router in routers.items()}
        report = None
        if probe:
            report = fidelity(
                loaded.model,
                lambda: swapped(loaded.model, {**linears, **live}),
                probe,
                loaded.device,
                layers=loaded.arch.layers,
                top_k=loaded.arch.top_k,
            )
        model = _merged_model(loaded.model, {**linears, **routers})
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        if extra_files is not None:
            extra_files(folder, report)
    return report


@torch.no_grad()
def merged_routers(model: PeftModel) -> dict[str, nn.Module]:
    """The plain router in the place of every one that trained, by module path; rounded as `merged_linears`."""
    merged: dict[str, nn.Module] = {}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            router: Any = copy.deepcopy(wrapper.original_module)
            trained = wrapper.modules_to_save[_ADAPTER].get_parameter("weight")
            router.weight.data = trained.to(MERGED_DTYPE).to(router.weight.dtype)
            merged[name] = router
    return merged


@torch.no_grad()
def merged_linears(model: PeftModel) -> dict[str, nn.Linear]:
    """The merged layer of every LoRA layer, by module path; weights rounded to bfloat16, in the base's dtype."""
    base: Any = model.get_base_model()
    merged: dict[str, nn.Linear] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = merged_weight(layer).to(MERGED_DTYPE)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.to(base.dtype), requires_grad=False)
            merged[name] = linear
    return merged


def merged_weight(lora: LoraLayer) -> Tensor:
    """[out, in] float32: the base's weight plus the update."""
    layer: Any = lora  # torch types a submodule's attributes as tensors
    a, b = layer.lora_A[_ADAPTER].weight.float(), layer.lora_B[_ADAPTER].weight.float()
    weight = dequantize_linear(layer.get_base_layer()) + layer.scaling[_ADAPTER] * (b @ a)
    if _ADAPTER not in layer.lora_magnitude_vector:
        return weight
    magnitude = layer.lora_magnitude_vector[_ADAPTER].weight.float().view(-1, 1)
    return magnitude * weight / weight.norm(dim=1, keepdim=True)


def _merged_model(model: PeftModel | PreTrainedModel, merged: Mapping[str, nn.Module]) -> PreTrainedModel:
    """The plain transformers model with merged layers in place of the adapter's, every float rounded to bfloat16."""
    base: Any = model
    if isinstance(model, PeftModel):
        for name, module in merged.items():
            model.set_submodule(name, module)
        base = model.get_base_model()
        base._hf_peft_config_loaded = False
    for module in base.modules():
        if not isinstance(module, QuantizedExperts):  # whose scales are part of their bits
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(MERGED_DTYPE)
    experts = base.hf_quantizer.quantization_config.experts
    base.hf_quantizer.quantization_config = Moe4bitConfig(attention="16bit", experts=experts)
    base.config.quantization_config = base.hf_quantizer.quantization_config
    base.config.dtype = MERGED_DTYPE
    base.is_loaded_in_4bit = False
    return base
