"""The limits that an engine is started with, and where the experts live while a model answers: all on the device, or in
the host's memory with slots on the device.

`auto` takes the device where everything fits: weights, keys and values for one request, and room for a prompt's
forward pass. Under `offload` what those leave goes to slots (`offloaded.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from finetune.checkpoint import read_json
from finetune.errors import DataError, DeviceError
from finetune.infer.offloaded import PIECE_TOKENS
from finetune.infer.pages import page_bytes, pages_for
from finetune.kernels import ExpertStorage
from finetune.memory import expert_bytes
from finetune.moe import MoeArch

Residency = Literal["auto", "resident", "offload"]
# Longer only when asked for: the pool and the rotary tables grow with it.
DEFAULT_MAX_LENGTH = 32768
# A forward pass of so many prompt tokens keeps an H100's GEMMs full; more would only hold up the running rows longer.
PREFILL_TOKENS = 4096
# What a request needs at least before `auto` calls a model resident.
_ROW_TOKENS = 4096
# CUDA's context, modules and graphs, which a device's budget must hold but torch does not count: 0.84 GiB on an H100.
CONTEXT_BYTES = int(0.85 * 2**30)
# Graphs, cuBLAS's workspace and what the allocator cannot use.
_MARGIN_BYTES = {"resident": 2**30, "offload": 2**28}
# Under offload: a slot more is worth more than a longer conversation, which --kv-gib gives.
_KV_SHARE = 1 / 32
_CPU_BYTES = 2**32
_CPU_KV_BYTES = 2**29


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        max_batch: requests that decode at once.
        max_length: tokens of a prompt and its answer; None: the model's positions, at most 32,768.
        kv_gib: memory for keys and values; None: what all rows at full length need, or what is free (offloaded: 1/32 of
            the device).
        residency: where the experts live; see above.
        device_gib: how much of the device may be used in all; None: what is free.
        routing: file with the load of the experts (`RUN/router/base.json`); offloaded, the hottest keep their slots.
    """

    max_batch: int = 16
    max_length: int | None = None
    kv_gib: float | None = None
    residency: Residency = "auto"
    device_gib: float | None = None
    routing: Path | None = None

    def __post_init__(self) -> None:
        """Raises a DeviceError for an unknown residency."""
        if self.residency not in get_args(Residency):
            raise DeviceError(
                f"there is no residency {self.residency!r}",
                where="--residency",
                allowed=", ".join(get_args(Residency)),
                fix="auto keeps the experts on the device where they fit",
            )

    def longest(self, positions: int) -> int:
        """Tokens of the longest request, for a model with this many positions."""
        return min(self.max_length or DEFAULT_MAX_LENGTH, positions)


def free_bytes(device: torch.device, device_gib: float | None) -> int:
    """Bytes that may still be allocated on the device, within the budget where one is given."""
    if device.type != "cuda":
        return int(device_gib * 2**30) if device_gib is not None else _CPU_BYTES
    allocated = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    return free if device_gib is None else min(free, int(device_gib * 2**30) - CONTEXT_BYTES - allocated)


def needs_offload(
    arch: MoeArch,
    dtype: torch.dtype,
    device: torch.device,
    settings: EngineSettings,
    longest: int,
    *,
    experts: ExpertStorage,
    attention_bits: float,
) -> bool:
    """Whether a model that is not loaded yet does not fit the device with its experts; a CPU's always does.

    Args:
        longest: tokens of the longest request.
        experts: how they are stored.
        attention_bits: of an attention weight, 16 or what NF4 takes.
    """
    if device.type != "cuda":
        return False
    plain = arch.embedding_params + arch.router_params + arch.norm_params
    matrices = arch.layers * arch.experts
    weights: float = matrices * sum(expert_bytes(out * in_, experts) for out, in_ in arch.expert_shapes().values())
    weights += arch.attention_params * attention_bits / 8
    weights += plain * dtype.itemsize
    row = pages_for(min(longest, _ROW_TOKENS)) * page_bytes(arch, dtype)
    needed = weights + row + _workspace(arch, dtype, longest, settings.max_batch, "resident")
    return needed > free_bytes(device, settings.device_gib)


def split_memory(
    arch: MoeArch, dtype: torch.dtype, device: torch.device, settings: EngineSettings, longest: int, *, offload: bool
) -> tuple[int, int]:
    """Divides what is free once the model is loaded, without its experts under `offload`.

    Args:
        longest: tokens of the longest request.

    Returns:
        Bytes of the device for keys and values, and for experts' slots (0: all experts are resident).
    """
    free = free_bytes(device, settings.device_gib)
    wanted_kv = (settings.max_batch * pages_for(longest) + 1) * page_bytes(arch, dtype)
    workspace = _workspace(arch, dtype, longest, settings.max_batch, "offload" if offload else "resident")
    if settings.kv_gib is not None:
        kv = int(settings.kv_gib * 2**30)
    elif offload:
        kv = int((settings.device_gib or free / 2**30) * 2**30 * _KV_SHARE)
    else:
        kv = free - workspace if device.type == "cuda" else _CPU_KV_BYTES
    kv = min(wanted_kv, kv)
    return kv, free - kv - workspace if offload else 0


def _workspace(
    arch: MoeArch, dtype: torch.dtype, longest: int, max_batch: int, residency: Literal["resident", "offload"]
) -> int:
    """Of a prompt's forward pass: its rows in the experts, the dequantized matrices, and the residual stream."""
    tokens = min(max_batch * longest, max(PREFILL_TOKENS, longest))
    in_experts = tokens if residency == "resident" else min(tokens, PIECE_TOKENS)
    rows = in_experts * arch.top_k * 4 * arch.intermediate
    matrices = (3 * arch.experts if residency == "resident" else 2) * arch.intermediate * arch.hidden
    stream = 8 * tokens * arch.hidden if residency == "offload" else 0
    return (rows + matrices + stream) * dtype.itemsize + _MARGIN_BYTES[residency]


def read_load(file: Path, arch: MoeArch) -> Sequence[Sequence[float]]:
    """Reads how often each expert of each layer was chosen, [L, E], as `finetune train` recorded it.

    Raises:
        DataError: the file is missing, of another kind or of another model.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a FinetuneError is a ValueError
        load = [list(map(float, layer["load"])) for layer in read_json(file, kind=DataError)["layers"]]
        if [len(row) for row in load] == [arch.experts] * arch.layers:
            return load
    raise DataError(
        "there is no load of this model's experts in the file" if file.is_file() else "there is no such file",
        where=f"--routing {file}",
        allowed=f"the routing of a run with {arch.layers} layers of {arch.experts} experts",
        fix="name RUN/router/base.json of a run with router.watch, or leave --routing out",
    )
