"""A checkpoint's weights one at a time: as they are stored, or as training saw them.

As training saw them: the values that the NF4 experts and a 4-bit attention stand for. A folder of quantized experts is
decoded; a 16-bit one is quantized and decoded expert by expert, which gives the bytes that training had, since every
expert's matrix is quantized by itself (`kernels/nf4.py`) in the dtype that the adapter records.

The file is opened anew for every tensor. safetensors maps it into memory, and what was read counts as this process's
until the map is gone: one map a file would let a merge grow by the base's 93 GB.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from torch import Tensor

from finetune.checkpoint import TensorInfo, incomplete, misshapen, read_tensor_infos, shard_files
from finetune.errors import FinetuneError, ModelError
from finetune.kernels import ExpertStorage, PackedExperts, dequantize_expert, empty_experts, packed_type, quantize_nf4
from finetune.moe.arch import EXPERT_PROJECTIONS, MoeArch, experts_path, hub_expert_names, hub_name, role_of
from finetune.moe.census import joined_hash, packed_hash, require_same_experts
from finetune.moe.config import AttentionStorage
from finetune.moe.finite import is_finite, not_finite

Onto = Literal["trained", "original"]
Shapes = dict[str, tuple[int, ...]]
_DTYPES = ("BF16", "F16", "F32", "U8")
# What bitsandbytes saves beside a 4-bit weight.
_LINEAR4BIT_PARTS = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4")


def expert_place(name: str) -> tuple[int, str]:
    """Layer and projection of a fused parameter (`model.layers.3.mlp.experts.down_proj`)."""
    layer, projection = int(name.split(".")[2]), name.rpartition(".")[2]
    assert projection in EXPERT_PROJECTIONS, name
    return layer, projection


class Tensors:
    """The tensors of safetensors files, by name.

    Raises:
        FinetuneError: of the given kind; a file's header is damaged, or a tensor has a dtype that no checkpoint of
            these models has.
    """

    def __init__(self, files: Iterable[Path], *, kind: type[FinetuneError] = ModelError):
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_tensor_infos(file, kind=kind):
                if info.dtype not in _DTYPES:
                    raise kind(
                        f"{info.name} has the dtype {info.dtype}",
                        where=str(file),
                        allowed=", ".join(_DTYPES),
                        fix="use the 16-bit checkpoint",
                    )
                self._infos[info.name] = info

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Checks names and shapes before hours are spent.

        Raises:
            ModelError: names what is missing, or of another shape.
        """
        missing = [name for name in shapes if name not in self._infos]
        if missing:
            raise incomplete(missing)
        for name, shape in shapes.items():
            if self._infos[name].shape != shape:
                raise misshapen(f"{self._infos[name].file}: {name}", self._infos[name].shape, shape)

    def read(self, name: str, *, row: int | None = None) -> Tensor:
        """The tensor as it is stored, or only `tensor[row]`: a map of the file, which goes when the tensor goes."""
        with safe_open(self._infos[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row]
        return tensor


class TrainedBase:
    """The weights of a checked base folder, by transformers' names.

    Args:
        shapes: of every parameter in transformers, as of a model on the meta device.
        attention: how the attention was stored in training.
        experts: how they are stored where the folder holds them quantized; else they are quantized to NF4.
        quantizing_dtype: what a 16-bit or 32-bit folder's weights had in training when they were quantized.
        recorded: `quant.hash_experts` of the model that was trained, where the adapter says.

    Raises:
        ModelError: a weight is missing or has another shape than the config's.
    """

    def __init__(
        self,
        folder: Path,
        arch: MoeArch,
        shapes: Shapes,
        *,
        attention: AttentionStorage,
        experts: ExpertStorage,
        quantizing_dtype: torch.dtype,
        onto: Onto,
        recorded: Mapping[str, str] | None = None,
    ):
        self._recorded = recorded
        self._hashes: dict[tuple[str, int], str] = {}
        self._folder = folder
        self._quantizing_dtype = quantizing_dtype
        self.arch, self.attention, self.experts, self.onto = arch, attention, experts, onto
        self._packed_type = packed_type(experts)
        self.tensors = Tensors(shard_files(folder))
        first = f"{experts_path(0)}.{EXPERT_PROJECTIONS[0]}"
        self._holds_packed = f"{first}_{self._packed_type._fields[0]}" in self.tensors
        self._holds_fused = first in self.tensors
        self.tensors.require(self._stored_shapes(shapes))

    def weight(self, name: str) -> Tensor:
        """A parameter that is no expert's: float32 [out, in] of an attention matrix, else in the dtype it has.

        Raises:
            ModelError: it is not finite.
        """
        weight = self._weight(name)
        if not is_finite(weight):
            stored = self._stored_name(name)
            raise not_finite(name, self._folder, [stored, f"{stored}.nested_absmax"])
        return weight

    def _weight(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        if self.onto == "original":
            return self.tensors.read(stored)
        if role_of(name) != "attention" or self.attention == "16bit":
            return self._as_loaded(self.tensors.read(stored))
        if self._holds_packed:
            parts = {f"weight.{part}": self.tensors.read(f"{stored}.{part}") for part in _LINEAR4BIT_PARTS}
            state = copy.copy(bnb.QuantState.from_dict(parts, device=torch.device("cpu")))
            state.dtype = torch.float32  # else the values come in the dtype that was quantized
            return bnb.dequantize_4bit(self.tensors.read(stored), state)
        return dequantize_expert(self._quantized(self.tensors.read(stored)), 0, torch.float32)

    def expert(self, layer: int, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """[out, in] of one expert's fused projection in a 16-bit dtype, rounded once.

        Raises:
            ModelError: a weight is not finite.
        """
        if self.onto == "trained":
            return dequantize_expert(self.packed(layer, expert, projection), 0, dtype)
        stored = self._stored_expert(layer, expert, projection)
        self._require_finite(layer, expert, projection, stored)
        return stored.to(dtype)

    def _require_finite(self, layer: int, expert: int, projection: str, *tensors: Tensor) -> None:
        if not is_finite(*tensors):
            fused = f"{experts_path(layer)}.{projection}"
            held = hub_expert_names(self.arch.model_type, layer, expert, projection)
            fields = (f"{fused}_{field}" for field in self._packed_type._fields)
            raise not_finite(f"{fused} of expert {expert}", self._folder, [*held, fused, *fields])

    def packed(self, layer: int, expert: int, projection: str) -> PackedExperts:
        """The packed weights of one expert: the bytes that training had."""
        fused = f"{experts_path(layer)}.{projection}"
        if self._holds_packed:
            fields = (self.tensors.read(f"{fused}_{field}", row=expert) for field in self._packed_type._fields)
            weights: PackedExperts = self._packed_type(*(field.unsqueeze(0) for field in fields))
        else:
            weights = self._quantized(self._stored_expert(layer, expert, projection))
        self._require_finite(layer, expert, projection, *(field for field in weights if field.is_floating_point()))
        if self._recorded:
            self._hashes[fused, expert] = packed_hash(weights)
        return weights

    @property
    def quantized_from(self) -> str | None:
        """The dtype that experts are quantized from; None where the folder holds them quantized, or they stay as is."""
        made = self.onto == "trained" and not self._holds_packed
        return str(self._quantizing_dtype).removeprefix("torch.") if made else None

    def prove(self) -> bool:
        """Whether the adapter records the experts' bytes, once all that were given out are proven to be those.

        Experts that a killed merge had written are made once more.

        Raises:
            AdapterError: names a tensor whose bytes are others.
        """
        if self.onto != "trained" or not self._recorded:
            return False
        found = {}
        for layer in range(self.arch.layers):
            for projection in EXPERT_PROJECTIONS:
                fused = f"{experts_path(layer)}.{projection}"
                for expert in range(self.arch.experts):
                    if (fused, expert) not in self._hashes:
                        self.packed(layer, expert, projection)
                found[fused] = joined_hash(self._hashes[fused, expert] for expert in range(self.arch.experts))
        require_same_experts(self._recorded, found, where=str(self._folder))
        return True

    def _stored_expert(self, layer: int, expert: int, projection: str) -> Tensor:
        if self._holds_fused:
            return self.tensors.read(f"{experts_path(layer)}.{projection}", row=expert)
        names = hub_expert_names(self.arch.model_type, layer, expert, projection)
        return torch.cat([self.tensors.read(name) for name in names])

    def _quantized(self, stored_OI: Tensor) -> PackedExperts:
        """The packed weights of one expert from [out, in]."""
        return quantize_nf4(self._as_loaded(stored_OI).unsqueeze(0))

    def _as_loaded(self, stored: Tensor) -> Tensor:
        # 16 bits are the same values in float32, and give the same bytes.
        return stored if self._quantizing_dtype == torch.float32 else stored.to(self._quantizing_dtype)

    def _stored_name(self, name: str) -> str:
        """Folders that transformers saved have its own names, hub folders the hub's."""
        return name if name in self.tensors else hub_name(self.arch.model_type, name)

    def _stored_shapes(self, shapes: Shapes) -> Shapes:
        """Names and shapes of what will be read, as far as the format of this folder gives them."""
        stored: Shapes = {}
        for name, shape in shapes.items():
            path, _, projection = name.rpartition(".")
            if role_of(name) != "experts":
                packed = self._holds_packed and self.attention == "nf4" and role_of(name) == "attention"
                stored[self._stored_name(name)] = (shape[0] * shape[1] // 2, 1) if packed else shape
            elif self._holds_packed:
                experts, out, in_ = shape
                parts = empty_experts(self.experts, experts, out, in_, "meta")._asdict().items()
                stored |= {f"{path}.{projection}_{field}": tuple(tensor.shape) for field, tensor in parts}
            elif self._holds_fused:
                stored[name] = shape
        if not (self._holds_packed or self._holds_fused):
            stored |= self.arch.hub_expert_shapes()
        return stored
