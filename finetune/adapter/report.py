"""`finetune adapter inspect`: what an adapter is and how much it changes, without loading a model.

The update of a matrix is s B A. Its Frobenius norm needs no product of that size: ||B A||^2 = tr(A A^T B^T B), two
r x r matrices, in float64. With the base at hand the norm is also given relative to the base's own weight, which is
what decides whether a merge can keep it (rounding to 4 bits loses an update of 1%); DoRA's update depends on the base,
so that without it only the norm of s B A is known. Of a non-MoE tuning only the distance from the base says anything.

Leaves out: hub ids as bases (give their folder with --base), and 4-bit attention weights, whose norms are not shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.adapter.adapter import Adapter
from finetune.checkpoint import check_model_folder, read_json, shard_files
from finetune.console import Report
from finetune.errors import AdapterError
from finetune.moe import MoeArch, Tensors, fingerprint_of, hub_name, require_fingerprint, router_path
from finetune.run_files import DataFile, recorded
from finetune.runfolder import RunFolder, run_of

TRAINING_FILE = "training.json"
_LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)?\.?(.+)")
_PREFIX = "base_model.model."


def inspect_adapter(folder: Path, *, base_path: str | None = None) -> dict[str, Any]:
    """What `--json` prints: kind, rank, alpha, scaling, targets, parameters, base, recipe, data, and `layers`.

    `layers` has for every layer, and for what lies outside of them under `layer: null`, the matrices by name, each with
    `update` (Frobenius norm), `base` and `relative`; null where it cannot be known.

    Args:
        base_path: folder of the base; the one that the adapter names when None.

    Raises:
        AdapterError: no adapter, a damaged one, or a base that it does not belong to.
        ModelError: the base's folder is damaged.
    """
    adapter = Adapter.open(folder, base=base_path)
    spec = adapter.base
    base = _Base.at_hand(adapter)
    tensors = load_file(adapter.tensors_file)
    is_lora = adapter.kind == "lora"
    norms = dict(_lora_norms(tensors, adapter.scaling, base) if is_lora else _full_norms(tensors, base))
    return {
        "folder": str(folder),
        **_settings(adapter),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "base": {
            "path": spec.path or None,
            "revision": spec.revision,
            "attention": spec.attention if adapter.recorded else None,
            "fingerprint": spec.fingerprint or None,
            "at_hand": base is not None,
        },
        **_training(adapter.folder),
        "layers": _by_layer(norms),
    }


def show_adapter(document: Mapping[str, Any], report: Report) -> None:
    """The document of `inspect_adapter` as two tables."""
    base, data = document["base"], document["data"] or {}
    rows = [
        ("kind", document["kind"]),
        ("parameters", f"{document['parameters']:,}"),
        ("base", (base["path"] or "not recorded") + (f" at {base['revision']}" if base["revision"] else "")),
        ("base's routers", base["fingerprint"] or "not recorded"),
        ("attention in training", base["attention"] or "not recorded"),
        ("recipe", document["recipe"] or "not at hand"),
        ("data", ", ".join(data.get("sources", ())) or "not recorded"),
        ("data's fingerprint", data.get("fingerprint") or "not recorded"),
    ]
    if document["rank"] is not None:
        scaling = f"{document['rank']}, {document['alpha']}, {document['scaling']:g}"
        rows[1:1] = [("rank, alpha, scaling", scaling), ("targets", ", ".join(document["targets"]))]
    report.table(str(document["folder"]), ("adapter", "value"), rows)
    names = list(dict.fromkeys(name for layer in document["layers"] for name in layer["norms"]))
    relative = base["at_hand"]
    if not relative:
        report.line("The base is not at hand: norms are absolute. --base FOLDER gives them relative to its weights.")
    table = [
        ("others" if layer["layer"] is None else str(layer["layer"]), *(_shown(layer["norms"].get(n)) for n in names))
        for layer in document["layers"]
    ]
    report.table(
        "Norm of the update" + (", relative to the base's weight" if relative else ""), ("layer", *names), table
    )


class _Base:
    """The weights of a base folder by transformers' names, read one at a time."""

    def __init__(self, folder: Path):
        self.arch = MoeArch.from_config(check_model_folder(folder), where=str(folder))
        self._tensors = Tensors(shard_files(folder))

    @classmethod
    def at_hand(cls, adapter: Adapter) -> _Base | None:
        if not adapter.named and not Path(adapter.base.path or "-").is_dir():
            return None
        base = cls(Path(adapter.base.path))
        routers = (base.weight(f"{router_path(layer)}.weight") for layer in range(base.arch.layers))
        require_fingerprint(adapter.base, fingerprint_of(weight for weight in routers if weight is not None))
        return base

    def weight(self, name: str) -> Tensor | None:
        """The tensor as it is stored; None where it is not there, or in 4 bits."""
        stored = name if name in self._tensors else hub_name(self.arch.model_type, name)
        tensor = self._tensors.read(stored) if stored in self._tensors else None
        return tensor if tensor is not None and tensor.is_floating_point() else None


def _lora_norms(
    tensors: Mapping[str, Tensor], scaling: float, base: _Base | None
) -> Iterator[tuple[str, dict[str, float | None]]]:
    for name, a in tensors.items():
        path = name.removesuffix(".lora_A.weight")
        if path == name:
            if ".lora_" not in name:  # a router that trained in full
                yield name, _distance(name.removeprefix(_PREFIX), a, base)
            continue
        a, b = a.double(), tensors[f"{path}.lora_B.weight"].double()
        weight = None if base is None else base.weight(f"{path.removeprefix(_PREFIX)}.weight")
        if weight is not None and tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise AdapterError(
                f"the adapter does not fit this base: its update is {b.shape[0]} x {a.shape[1]}",
                where=path.removeprefix(_PREFIX),
                allowed=f"{weight.shape[0]} x {weight.shape[1]}, the base's weight",
                fix="name the base that it was trained on",
            )
        magnitude = tensors.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None and weight is not None:
            tuned = weight.double() + scaling * (b @ a)
            moved = magnitude.double().view(-1, 1) * tuned / tuned.norm(dim=1, keepdim=True) - weight.double()
            update = moved.norm().item()
        else:
            # Rounding may leave the trace of a zero update a little below zero.
            update = scaling * math.sqrt(max(torch.trace((a @ a.T) @ (b.T @ b)).item(), 0.0))
        yield f"{path}.weight", _norms(update, weight)


def _full_norms(tensors: Mapping[str, Tensor], base: _Base | None) -> Iterator[tuple[str, dict[str, float | None]]]:
    for name, tensor in tensors.items():
        yield name, _distance(name, tensor, base)


def _distance(name: str, tuned: Tensor, base: _Base | None) -> dict[str, float | None]:
    weight = None if base is None else base.weight(name)
    if weight is None:
        return {"update": None, "base": None, "relative": None}
    return _norms((tuned.double() - weight.double()).norm().item(), weight)


def _norms(update: float, weight: Tensor | None) -> dict[str, float | None]:
    norm = None if weight is None else weight.double().norm().item()
    return {"update": update, "base": norm, "relative": update / norm if norm else None}


def _by_layer(norms: Mapping[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    layers: dict[int | None, dict[str, dict[str, float | None]]] = {}
    for name, values in norms.items():
        match = _LAYER.fullmatch(name)
        short = (match[2] if match else name.removeprefix("model.")).removesuffix(".weight")
        layers.setdefault(int(match[1]) if match else None, {})[short] = values
    order = sorted(layers, key=lambda layer: math.inf if layer is None else layer)
    return [{"layer": layer, "norms": dict(sorted(layers[layer].items()))} for layer in order]


def _settings(adapter: Adapter) -> dict[str, Any]:
    lora = adapter.settings
    if lora is None:
        return {"kind": "non-MoE", "rank": None, "alpha": None, "scaling": None, "targets": []}
    return {
        "kind": "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA",
        "rank": lora.r,
        "alpha": lora.alpha,
        "scaling": lora.scaling,
        "targets": sorted((*adapter.targets, *(["gate"] if lora.router else []))),
    }


def _training(folder: Path) -> dict[str, Any]:
    """Recipe and data: of the run that the folder lies in, or as they were published with it."""
    run = RunFolder(run_of(folder))
    if run.run_file.is_file() and run.data.is_file():
        return {"recipe": str(run.recipe), "data": data_facts(recorded(run.data, DataFile, kind=AdapterError))}
    if (folder / TRAINING_FILE).is_file():
        data = read_json(folder / TRAINING_FILE, kind=AdapterError).get("data")
        return {"recipe": str(folder / "recipe.yaml"), "data": data}
    return {"recipe": None, "data": None}


def data_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Sources, rows, tokens and fingerprint of the training data, from a run's data.json."""
    train = document["parts"][0]
    return {
        "sources": [source["where"] for source in train["sources"]],
        "examples": train["examples"],
        "tokens": train["tokens"],
        "fingerprint": train.get("fingerprint"),  # runs before it was recorded have none
    }


def _shown(norms: Mapping[str, float | None] | None) -> str:
    if norms is None:
        return ""
    if norms["relative"] is not None:
        return f"{norms['relative']:.2%}"
    return "" if norms["update"] is None else f"{norms['update']:.4g}"
