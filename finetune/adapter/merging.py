"""What a merge reads: the base that was trained, or its 16-bit original, and the adapters on it, checked before
anything is written and then read one weight at a time.

An adapter's update of W is s B A for LoRA and rsLoRA (s is alpha/r or alpha/sqrt(r)). For the rest it is the difference
from W of what replaces it: m (W + s B A) / ||W + s B A|| for DoRA (arXiv 2402.09353, eq. 5; norms over each output's
row), the trained weight itself for routers and non-MoE tunings. Several adapters combine as W + sum of factor * update,
in float32.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapter.adapter import Adapter, is_adapter
from finetune.checkpoint import read_json
from finetune.errors import AdapterError, ModelError
from finetune.moe import (
    BaseSpec,
    MoeArch,
    Onto,
    Tensors,
    TrainedBase,
    check_base,
    fingerprint_of,
    load_tokenizer,
    of_plain_weights,
    require_fingerprint,
    router_path,
)

_BASE_FILES = ["*.json", "*.safetensors"]
_LORA_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weighted:
    """An adapter folder and the factor of its update."""

    folder: Path
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Weighted:
        """From `PATH=FACTOR`; without a factor it is 1.

        Raises:
            AdapterError: the factor is not a finite number.
        """
        path, equals, factor = text.rpartition("=")
        try:
            value = float(factor) if equals else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise AdapterError(
                f"{factor!r} is not a factor",
                where=f"--with {text}",
                allowed="PATH=NUMBER, or PATH alone for 1",
                fix="give a number like 0.5 after the last '='",
            )
        return cls(Path(path if equals else text), value)


class Tuning:
    """One adapter folder, read tensor by tensor."""

    def __init__(self, adapter: Adapter, factor: float):
        self.adapter, self.factor = adapter, factor
        self._lora, self._scaling = adapter.kind == "lora", adapter.scaling
        self._tensors = Tensors([adapter.tensors_file], kind=AdapterError)

    def changes(self, name: str) -> bool:
        """Whether a parameter, by transformers' name, is another with this adapter."""
        return self._name(name) in self._tensors or f"{self._matrix(name)}.lora_A.weight" in self._tensors

    def added(self, name: str, base: Tensor, weight: Tensor) -> Tensor:
        """`weight` plus the factor times this adapter's update of `base`; all float32 [out, in] or [out]."""
        path = self._matrix(name)
        if f"{path}.lora_A.weight" not in self._tensors:
            return self._moved(base, weight, self._tensors.read(self._name(name)).float())
        a, b = (self._tensors.read(f"{path}.{part}.weight").float() for part in ("lora_A", "lora_B"))
        if f"{path}.lora_magnitude_vector" not in self._tensors:
            return weight + self.factor * self._scaling * (b @ a)
        magnitude = self._tensors.read(f"{path}.lora_magnitude_vector").float().view(-1, 1)
        tuned = base + self._scaling * (b @ a)
        return self._moved(base, weight, magnitude * tuned / tuned.norm(dim=1, keepdim=True))

    def _moved(self, base: Tensor, weight: Tensor, tuned: Tensor) -> Tensor:
        if self.factor == 1 and weight is base:
            return tuned  # base + (tuned - base) would round
        return weight + self.factor * (tuned - base)

    def _name(self, name: str) -> str:
        return f"{_LORA_PREFIX}{name}" if self._lora else name

    def _matrix(self, name: str) -> str:
        return self._name(name).removesuffix(".weight")


def tuned_weight(tunings: Sequence[Tuning], name: str, base: Tensor) -> Tensor:
    """float32: the base's weight with every update added, in order.

    Raises:
        AdapterError: the result is not finite.
    """
    start = base.float()
    weight = start
    for tuning in tunings:
        if tuning.changes(name):
            weight = tuning.added(name, start, weight)
    if not torch.isfinite(weight).all():
        raise AdapterError(
            "a merged weight is not finite",
            where=name,
            fix="train again with a lower learning rate, or combine the adapters with smaller factors",
        )
    return weight


@dataclass(frozen=True)
class MergeSource:
    """A base folder and its adapters, checked against each other.

    shapes: of every parameter, by transformers' names, tied ones once.
    config: the base's config.json as it lies on the disk, without its quantization.
    """

    spec: BaseSpec
    folder: Path
    arch: MoeArch
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: TrainedBase
    tunings: list[Tuning]

    @property
    def recorded(self) -> bool:
        """Whether every adapter says what it was trained on."""
        return all(tuning.adapter.recorded for tuning in self.tunings)

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A merged parameter that is no expert's, rounded once.

        Raises:
            AdapterError: an update makes it infinite or no number.
            ModelError: the dtype cannot hold it.
        """
        weight = self.weights.weight(name)
        if any(tuning.changes(name) for tuning in self.tunings):
            weight = tuned_weight(self.tunings, name, weight)
        return rounded(name, weight, dtype)

    def expert(self, layer: int, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """[out, in] of one expert's fused projection, rounded once.

        Raises:
            ModelError: the dtype cannot hold it.
        """
        matrix = self.weights.expert(layer, expert, projection, dtype)
        _require_held(f"expert {expert} of layer {layer}: {projection}", matrix, dtype)
        return matrix

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The first adapter's, or the base's where another toolkit saved an adapter without one."""
        adapter = self.tunings[0].adapter
        return load_tokenizer(str(adapter.folder if adapter.has_tokenizer else self.folder))

    def copy_generation_config(self, folder: Path) -> None:
        """Into a folder that is being filled, where the base has one."""
        generation = self.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)

    @property
    def identity(self) -> dict[str, Any]:
        """Every file that is read, by size and time: what makes a started merge the same as this one."""
        folders = (self.folder, *(tuning.adapter.folder for tuning in self.tunings))
        files = (file for folder in folders for file in sorted(folder.iterdir()) if file.is_file())
        stats = ((str(file.absolute()), file.stat()) for file in files)
        return {
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "factors": [tuning.factor for tuning in self.tunings],
            "onto": self.weights.onto,
        }

    def to_dict(self) -> dict[str, Any]:
        """What a written folder says of itself, after the proof that the experts in it are those that were trained.

        Raises:
            AdapterError: they are not.
        """
        return {
            "onto": self.weights.onto,
            "experts": self.weights.experts if self.weights.onto == "trained" else "original",
            "experts_proven": self.weights.prove(),
            "experts_made_of": self.weights.quantized_from,
            "base": str(self.folder),
            "trained_on": self.spec.path if self.recorded else None,
            "router_fingerprint": self.spec.fingerprint,
            "adapters": [
                {"path": str(t.adapter.folder), "kind": t.adapter.kind, "factor": t.factor} for t in self.tunings
            ],
        }


def open_source(
    adapters: Sequence[Weighted],
    *,
    onto: Onto | None = None,
    base_path: str | None = None,
    original: str | None = None,
) -> MergeSource:
    """Checks base and adapters and opens them; reads headers and routers only.

    Args:
        onto: None for what was trained, where the adapter says what that was, and else for the base as it is stored.
        original: the 16-bit checkpoint for `onto="original"`, where the base that was trained is not one.

    Raises:
        AdapterError: an adapter is missing or damaged or does not fit, or there is no 16-bit original.
        ModelError: the base is missing, damaged or incomplete.
    """
    for weighted in adapters:
        require_adapter(weighted.folder)
    first, *others = (Adapter.open(weighted.folder, base=base_path) for weighted in adapters)
    if original is not None and onto != "original":
        raise AdapterError(
            "--original names a checkpoint that is not merged onto",
            where="command line",
            allowed="--onto original --original PATH",
            fix="add --onto original, or leave --original out",
        )
    spec = first.require_base()
    if original is not None:
        spec = replace(spec, path=original, revision=None)
    folder = local_folder(spec)
    config = read_json(folder / "config.json")
    if onto is None:
        onto = "trained" if first.recorded or config.get("quantization_config") else "original"
    if onto == "original" and config.get("quantization_config"):
        raise AdapterError(
            "there is no 16-bit original to merge onto: the base is a quantized folder",
            where=str(folder),
            allowed="--onto trained, or --onto original --original PATH with the checkpoint that was quantized",
            fix="name the original with --original, or merge onto what was trained",
        )
    quantization = config.get("quantization_config") or {}
    assert spec.quantizing_dtype is not None, "an adapter's base has one"
    if onto == "trained" and not quantization and spec.experts != "nf4":
        raise AdapterError(
            f"the adapter was trained on experts in {spec.experts}, and the base is a checkpoint in 16 bits",
            where=str(folder),
            allowed=f"the folder that `finetune quantize --experts {spec.experts}` made of it; or --onto original",
            fix="name that folder with --base",
        )
    _, arch = check_base(replace(spec, path=str(folder)))
    skeleton = _skeleton(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    weights = TrainedBase(
        folder,
        arch,
        shapes,
        attention=spec.attention,
        experts=quantization.get("experts", "nf4"),
        quantizing_dtype=getattr(torch, spec.quantizing_dtype),
        onto=onto,
        recorded=spec.experts_sha256,
    )
    routers = (weights.weight(f"{router_path(layer)}.weight") for layer in range(arch.layers))
    fingerprint = fingerprint_of(routers)
    require_fingerprint(spec, fingerprint)
    for adapter in (first, *others):
        adapter.require_trained_on(replace(spec, fingerprint=fingerprint))
        adapter.require_fits(skeleton)
    tunings = [Tuning(adapter, one.factor) for adapter, one in zip((first, *others), adapters, strict=True)]
    return MergeSource(spec, folder, arch, of_plain_weights(config), shapes, weights, tunings)


def require_adapter(folder: Path) -> None:
    """Refuses a folder that holds nothing to merge.

    Raises:
        AdapterError: names the folder.
    """
    if not is_adapter(folder):
        raise AdapterError(
            "there is no adapter to merge",
            where=str(folder),
            allowed="the folder of a run, or of an adapter",
            fix="this is a model: there is nothing to merge into it"
            if (folder / "config.json").is_file()
            else "check the path",
        )


def local_folder(spec: BaseSpec) -> Path:
    """Where the base's files lie; a hub id is fetched, or found in the cache.

    Raises:
        ModelError: it is neither a folder nor can be fetched.
    """
    if Path(spec.path).is_dir():
        return Path(spec.path)
    check_base(spec)  # says what is wrong with a path or a hub id
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=_BASE_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the base could not be fetched: {error}",
            where=spec.path,
            fix="check the network and, for gated models, the HF_TOKEN; or name a local copy with --base",
        ) from None


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype.

    Raises:
        ModelError: the dtype cannot hold a value.
    """
    result = weight.to(dtype)
    _require_held(name, result, dtype)
    return result


def _require_held(name: str, weight: Tensor, dtype: torch.dtype) -> None:
    # bfloat16 has float32's range.
    if dtype == torch.float16 and not torch.isfinite(weight).all():
        raise ModelError(
            "a weight is too large for float16",
            where=name,
            allowed=f"values up to {torch.finfo(torch.float16).max:.0f}",
            fix="merge to bf16, whose range is float32's",
        )


def _skeleton(folder: Path) -> PreTrainedModel:
    """The base on the meta device: names and shapes without a byte of weights."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
