"""What is really in memory: bytes by role and dtype, counted tensor by tensor before the first step.

transformers 5 with `load_in_4bit` leaves Mixtral's experts in bf16 without a word; the census is the proof that ours
are not. It counts storage, so shared (tied) tensors count once and bitsandbytes' hidden quantization state counts.
A hash over the experts' bytes is kept with the adapter: a merge proves by it that it writes the ones that trained.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from finetune.errors import AdapterError, ModelError
from finetune.kernels import PackedExperts
from finetune.moe.arch import EXPERT_PROJECTIONS, role_of
from finetune.moe.experts import QuantizedExperts

_PIECE = 2**24  # bytes hashed at a time, so that each thread locks no more of the host's memory


@dataclass(frozen=True)
class CensusRow:
    """Bytes of one role in one dtype, over `tensors` tensors."""

    role: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Census:
    rows: tuple[CensusRow, ...]
    unquantized_experts: tuple[tuple[str, int], ...]
    """(name, bytes) of every expert weight that is not quantized."""

    @property
    def total_bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "rows": [vars(row) for row in self.rows],
            "unquantized_experts": [{"name": name, "bytes": size} for name, size in self.unquantized_experts],
        }


def take_census(model: nn.Module) -> Census:
    """Counts every parameter and buffer of `model`; parameters on the meta device count with their full size."""
    from bitsandbytes.nn import Params4bit

    totals: dict[tuple[str, str], list[int]] = {}
    unquantized: list[tuple[str, int]] = []
    storages = {name: module.storage for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        role, dtype = role_of(name), str(tensor.dtype).removeprefix("torch.")
        pieces = [tensor]
        if isinstance(tensor, Params4bit) and tensor.quant_state is not None:
            dtype = tensor.quant_state.quant_type
            state, nested = tensor.quant_state, tensor.quant_state.state2
            pieces += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
        elif role == "experts" and name.rpartition(".")[0] in storages and not tensor.is_meta:
            dtype = storages[name.rpartition(".")[0]]
        elif role == "experts":
            unquantized.append((name, tensor.nbytes))
        entry = totals.setdefault((role, dtype), [0, 0])
        entry[0] += 1
        entry[1] += sum(piece.nbytes for piece in pieces)
    rows = tuple(CensusRow(role, dtype, *entry) for (role, dtype), entry in sorted(totals.items()))
    return Census(rows, tuple(unquantized))


def require_quantized_experts(census: Census) -> None:
    """Refuses a model with an expert that is not quantized.

    Raises:
        ModelError: names the tensors, their bytes, and the way out.
    """
    left = census.unquantized_experts
    if not left and any(row.role == "experts" for row in census.rows):
        return
    if not left:
        raise ModelError(
            "the model holds no experts at all",
            where="byte census",
            fix="load a mixture of experts with quantization_config=Moe4bitConfig()",
        )
    size = sum(size for _, size in left)
    names = ", ".join(name for name, _ in left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    raise ModelError(
        f"{len(left)} expert tensors ({size / 2**30:.2f} GiB) are not quantized",
        where=names,
        allowed="experts in nf4, hqq3 or hqq2",
        fix="load through `finetune` or with quantization_config=Moe4bitConfig(); "
        "transformers' load_in_4bit does not reach fused experts",
    )


def hash_experts(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the quantized bytes of every layer's and projection's experts, by the fused tensor's name.

    Each thread takes an expert. Mixtral 8x7B's 23.3 GB, on an H200: 3.3 s, 8 threads.
    """
    found = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedExperts):
                for projection in EXPERT_PROJECTIONS:
                    weights = module.packed(projection)
                    each = pool.map(partial(_expert_hash, weights), range(weights.packed.shape[0]))
                    found[f"{name}.{projection}"] = joined_hash(each)
    return found


def packed_hash(weights: PackedExperts) -> str:
    """SHA-256 of packed weights' bytes: codes, scales and all that belongs to them, in order."""
    digest = hashlib.sha256()
    for tensor in weights:
        for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_PIECE):
            # Page-locked: through ordinary memory the same takes 13 s.
            host = torch.empty_like(piece, device="cpu", pin_memory=True).copy_(piece) if piece.is_cuda else piece
            digest.update(host.numpy().data)
    return digest.hexdigest()


def joined_hash(experts: Iterable[str]) -> str:
    """Of all experts of a layer and projection, from each one's own."""
    return hashlib.sha256("".join(experts).encode()).hexdigest()


def require_same_experts(recorded: Mapping[str, str], found: Mapping[str, str], *, where: str) -> None:
    """Refuses experts of other bytes than those that an adapter was trained on.

    Raises:
        AdapterError: names the first tensor that differs.
    """
    other = [name for name, digest in recorded.items() if found.get(name) != digest]
    if other:
        expected, here = recorded[other[0]], found.get(other[0], "none")
        raise AdapterError(
            f"the experts' bytes are not those that the adapter was trained on: {len(other)} of {len(recorded)} differ",
            where=f"{where}: {other[0]}",
            allowed=f"SHA-256 {expected[:12]}, which base.json records (here {here[:12]})",
            fix="name the base that was trained on, unchanged, and the release of moe-qlora that trained it",
        )


def _expert_hash(weights: PackedExperts, expert: int) -> str:
    return packed_hash(type(weights)(*(tensor[expert : expert + 1] for tensor in weights)))
