"""The base's weights one at a time, as training saw them or as the hub has them.

Trained: the values that the experts and a 4-bit attention stand for. A folder of quantized experts is decoded; a 16-bit
one is quantized and decoded expert by expert, which gives the bytes that training had, since every expert's matrix is
quantized by itself (`kernels/nf4.py`), in the dtype that the adapter records. Original: what is stored, untouched.

All of it runs in pieces that stay in the processor's cache: whole, one of Mixtral's matrices makes temporaries of half
a gigabyte, and takes three to six times as long (2 cores). Where only the values are wanted they come from a table, and
no bytes are made: 3 ns a weight instead of 11 for both ways (1 core).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from finetune.export import buffers
from finetune.export.tensors import Tensors
from finetune.kernels import (
    BLOCK,
    NESTED_BLOCK,
    NF4_CODE,
    ExpertStack,
    ExpertStorage,
    Nf4Stack,
    dequantize_expert,
    dynamic_map,
    empty_experts,
    quantize_scales,
    quantize_stack,
    stack_type,
)
from finetune.moe import (
    EXPERT_PROJECTIONS,
    AttentionStorage,
    MoeArch,
    experts_path,
    hub_expert_names,
    hub_name,
    is_finite,
    joined_hash,
    not_finite,
    require_same_experts,
    role_of,
    stack_hash,
)

Onto = Literal["trained", "original"]
Shapes = dict[str, tuple[int, ...]]
# Weights of a piece: 1 MiB in float32.
_PIECE = 2**18
_CPU = torch.device("cpu")
# What bitsandbytes saves beside a 4-bit weight.
_LINEAR4BIT_PARTS = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4")


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
        self._stack = stack_type(experts)
        self.tensors = Tensors.of_model(folder)
        first = f"{experts_path(0)}.{EXPERT_PROJECTIONS[0]}"
        self._holds_stacks = f"{first}_{self._stack._fields[0]}" in self.tensors
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
        if self._holds_stacks:
            parts = {f"weight.{part}": self.tensors.read(f"{stored}.{part}") for part in _LINEAR4BIT_PARTS}
            state = copy.copy(bnb.QuantState.from_dict(parts, device=_CPU))
            state.dtype = torch.float32  # else the values come in the dtype that was quantized
            return bnb.dequantize_4bit(self.tensors.read(stored), state)
        return trained_values(self._as_loaded(self.tensors.read(stored)), torch.float32)

    def expert(self, layer: int, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """[out, in] of one expert's fused projection in a 16-bit dtype, rounded once.

        Raises:
            ModelError: a weight is not finite.
        """
        if self._holds_stacks or (self._recorded and self.onto == "trained"):
            return decode(self.stack(layer, expert, projection), dtype)
        stored = self._stored_expert(layer, expert, projection)
        if self.onto == "trained":
            values = trained_values(self._as_loaded(stored), dtype)
            # A weight that is not finite reaches every value, through the mean of the scales.
            self._require_finite(layer, expert, projection, values[:1, :1].float())
            return values
        self._require_finite(layer, expert, projection, stored)
        return stored.to(dtype)

    def _require_finite(self, layer: int, expert: int, projection: str, *tensors: Tensor) -> None:
        if not is_finite(*tensors):
            fused = f"{experts_path(layer)}.{projection}"
            held = hub_expert_names(self.arch.model_type, layer, expert, projection)
            fields = (f"{fused}_{field}" for field in self._stack._fields)
            raise not_finite(f"{fused} of expert {expert}", self._folder, [*held, fused, *fields])

    def stack(self, layer: int, expert: int, projection: str) -> ExpertStack:
        """A stack of one expert: the bytes that training had."""
        fused = f"{experts_path(layer)}.{projection}"
        if self._holds_stacks:
            fields = (self.tensors.read(f"{fused}_{field}", row=expert) for field in self._stack._fields)
            stack: ExpertStack = self._stack(*(field.unsqueeze(0) for field in fields))
        else:
            stack = encode(self._as_loaded(self._stored_expert(layer, expert, projection)))
        self._require_finite(layer, expert, projection, *(field for field in stack if field.is_floating_point()))
        if self._recorded:
            self._hashes[fused, expert] = stack_hash(stack)
        return stack

    @property
    def quantized_from(self) -> str | None:
        """The dtype that experts are quantized from; None where the folder holds them quantized, or they stay as is."""
        made = self.onto == "trained" and not self._holds_stacks
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
                        self.stack(layer, expert, projection)
                found[fused] = joined_hash(self._hashes[fused, expert] for expert in range(self.arch.experts))
        require_same_experts(self._recorded, found, where=str(self._folder))
        return True

    def _stored_expert(self, layer: int, expert: int, projection: str) -> Tensor:
        if self._holds_fused:
            return self.tensors.read(f"{experts_path(layer)}.{projection}", row=expert)
        names = hub_expert_names(self.arch.model_type, layer, expert, projection)
        return self.tensors.read_joined(names)

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
                packed = self._holds_stacks and self.attention == "nf4" and role_of(name) == "attention"
                stored[self._stored_name(name)] = (shape[0] * shape[1] // 2, 1) if packed else shape
            elif self._holds_stacks:
                experts, out, in_ = shape
                parts = empty_experts(self.experts, experts, out, in_, "meta")._asdict().items()
                stored |= {f"{path}.{projection}_{field}": tuple(tensor.shape) for field, tensor in parts}
            elif self._holds_fused:
                stored[name] = shape
            else:
                experts, out, in_ = shape
                layer = int(path.split(".")[2])
                for expert in range(experts):
                    names = hub_expert_names(self.arch.model_type, layer, expert, projection)
                    stored |= {matrix: (out // len(names), in_) for matrix in names}
        return stored


def encode(matrix_OI: Tensor) -> Nf4Stack:
    """A stack of one from [out, in]."""
    return quantize_stack(matrix_OI.unsqueeze(0))


def _decode_scales(indices: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    code = dynamic_map(_CPU)
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(indices, nested, code, NESTED_BLOCK, torch.float32)
    return scales + offset


def decode(stack: ExpertStack, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype` of a stack of one: the values of `dequantize_expert`, NF4's made piece by piece."""
    if not isinstance(stack, Nf4Stack):
        return dequantize_expert(stack, 0, dtype)
    scales = _decode_scales(stack.absmax[0], stack.nested_absmax[0], stack.offset)
    values = torch.empty(stack.matrix_shape, dtype=dtype)
    pieces = zip(values.view(-1).split(_PIECE), stack.packed.view(-1).split(_PIECE // 2), strict=True)
    for piece, (into, codes) in enumerate(pieces):
        of_piece = scales[piece * (_PIECE // BLOCK) : (piece + 1) * (_PIECE // BLOCK)]
        into.copy_(torch.ops.bitsandbytes.dequantize_4bit(codes, of_piece, BLOCK, "nf4", into.shape, dtype).view(-1))
    return values


def trained_values(matrix_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`: `decode(encode(matrix), dtype)`, bit for bit; quicker for bfloat16.

    A weight's level depends on its ratio to its block's absmax. Shifting both by a power of two shifts every step of
    the arithmetic exactly, so of bfloat16 what counts are the absmax's 7 bits of mantissa, the weight's sign, and the
    difference of their bits read as integers; from 8 powers of two on the level is zero. A table over these has 2^18
    levels, of which a block needs 8 KiB.
    """
    if matrix_OI.dtype != torch.bfloat16:
        return decode(encode(matrix_OI), dtype)
    bits = matrix_OI.contiguous().view(torch.int16).view(-1, BLOCK)
    rows = _PIECE // BLOCK
    size = min(bits.numel(), _PIECE)
    magnitudes, signs = (torch.empty(size, dtype=torch.int16).view(-1, BLOCK) for _ in range(2))
    places, values = torch.empty(size, dtype=torch.int32).view(-1, BLOCK), torch.empty(size)
    top = torch.empty(len(bits), dtype=torch.int16)
    for piece, into in zip(bits.split(rows), top.split(rows), strict=True):
        torch.amax(torch.bitwise_and(piece, 0x7FFF, out=magnitudes[: len(piece)]), 1, out=into)
    if not (((top >= _SHIFTED.start) & (top < _SHIFTED.stop)) | (top == 0)).all():
        return decode(encode(matrix_OI), dtype)
    indices, nested, offset = quantize_scales(top.view(torch.bfloat16).float().unsqueeze(0))
    scales = _decode_scales(indices[0], nested[0], offset)
    table = ((top & 0x7F).to(torch.int32) * (2 * _STEPS)).view(-1, 1)
    # A block of zeros has any absmax above zero.
    top.clamp_(min=_SHIFTED.start)
    result = torch.from_numpy(buffers.take(bits.numel() * dtype.itemsize)).view(dtype)
    pieces = zip(
        *(tensor.split(rows) for tensor in (bits, top.view(-1, 1), table, scales.view(-1, 1), result.view(-1, BLOCK))),
        strict=True,
    )
    for piece, top_of, table_of, scales_of, into in pieces:
        count = len(piece)
        below, sign, place = magnitudes[:count], signs[:count], places[:count]
        torch.sub(top_of, torch.bitwise_and(piece, 0x7FFF, out=below), out=below).clamp_(max=_STEPS - 1)
        below += torch.bitwise_right_shift(piece, 5, out=sign).bitwise_and_(_STEPS)
        place.copy_(below).add_(table_of)
        levels = torch.index_select(_LEVELS, 0, place.view(-1), out=values[: piece.numel()])
        into.copy_(levels.view(-1, BLOCK).mul_(scales_of))
    return result.view(matrix_OI.shape)


# Eight powers of two of 128 bfloat16s each.
_STEPS = 2**10
# The bits of 2^-110 to 2^120: above and below, a ratio's float32 steps may meet subnormal numbers.
_SHIFTED = range((127 - 110) << 7, (127 + 120) << 7)


def _level_table() -> Tensor:
    """float32 [128 mantissas of an absmax, 2 signs, _STEPS below it], flat: the level of the weight."""
    absmax = torch.arange(127 << 7, 128 << 7, dtype=torch.int16).view(-1, 1)
    weights = (absmax - torch.arange(_STEPS, dtype=torch.int16)).view(torch.bfloat16).float()
    x = weights * (1.0 / absmax.view(torch.bfloat16).float())
    levels = torch.tensor(NF4_CODE)
    return levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, torch.stack([x, -x], 1).view(-1))]


_LEVELS = _level_table()
