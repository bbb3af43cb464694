"""The table: everything that a run needs of its device, and the largest micro-batch that fits."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.memory.advice import Advice, advise
from finetune.memory.run import GIB, Backend, MemoryItem, Run
from finetune.memory.static import training, weights
from finetune.memory.step import peak_items, step_peak

# What the driver and the kernels take of a device before the first tensor: 0.5 GiB is assumed.
CUDA_CONTEXT = GIB // 2
# cuBLAS asks torch's allocator for 32 MiB a handle on compute capability 9.0, and the forward and the backward pass
# run in threads with a handle each.
CUBLAS_WORKSPACES = 2 * 32 * 2**20
# What torch's allocator reserves beyond the tensors: so much of what comes and goes, and so much at least. Measured on
# an H100 with expandable segments and the loop backend: 0.3 GiB at 8 x 1024 and at 4 x 4096 tokens.
FRAGMENTATION, FRAGMENTATION_AT_LEAST = 50, GIB // 4
MAX_MICRO_BATCH = 2**16


@dataclass(frozen=True)
class MemoryEstimate:
    """The items, what they add up to, and what to do when that is too much.

    `device_bytes` is what the process may use, None where that is not known; then nothing is said about fitting.
    `largest_micro_batch` is of the plan that needs least, as far as the recipe leaves the choice.
    `advice`, `overrides` and `what_fits` are empty where it fits (finetune/memory/advice.py).
    `bundled_shape` says that the model's config came with the toolkit, because the hub did not give it.
    """

    items: tuple[MemoryItem, ...]
    device_bytes: int | None
    micro_batch: int
    seq_len: int
    layers: int
    keep_attention: int
    keep_gate_up: int
    resident_attention: bool
    backend: Backend
    trained_bytes: int
    optimizer_bytes: int
    largest_micro_batch: int | None
    advice: tuple[str, ...]
    overrides: tuple[str, ...]
    what_fits: str
    bundled_shape: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def tensor_bytes(self) -> int:
        """The largest sum of tensors at a time, as `torch.cuda.max_memory_allocated` measures it."""
        return sum(item.bytes for item in self.items if item.kind != "fixed")

    @property
    def weight_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.kind == "weights")

    @property
    def checkpoint_bytes(self) -> int:
        """Trained weights in float32 and optimizer states, as a checkpoint holds them."""
        return self.trained_bytes + self.optimizer_bytes

    @property
    def fits(self) -> bool:
        """True as well when the device's size is not known."""
        return self.device_bytes is None or self.total_bytes <= self.device_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "total_bytes": self.total_bytes,
            "tensor_bytes": self.tensor_bytes,
            "weight_bytes": self.weight_bytes,
            "fits": self.fits,
        }


def estimate(run: Run, *, device_bytes: int | None = None, least: Run | None = None) -> MemoryEstimate:
    """Adds up a run.

    Args:
        device_bytes: what the process may use of its device; None leaves out the largest micro-batch and the advice.
        least: the same run as it would be if memory were short (with full checkpointing, where the plan is free).
    """
    least = least or run
    items = _items(run)
    (optimizer,) = (item.bytes for item in items if item.name == "optimizer")
    advice = Advice()
    if device_bytes is not None and sum(item.bytes for item in items) > device_bytes:
        advice = advise(least, device_bytes, total)
    return MemoryEstimate(
        items=items,
        device_bytes=device_bytes,
        micro_batch=run.micro_batch,
        seq_len=run.seq_len,
        layers=run.arch.layers,
        keep_attention=run.keep_attention,
        keep_gate_up=run.keep_gate_up,
        resident_attention=run.resident_attention,
        backend=run.backend,
        trained_bytes=4 * run.trained,
        optimizer_bytes=optimizer,
        largest_micro_batch=None if device_bytes is None else _largest_micro_batch(least, device_bytes),
        advice=advice.lines,
        overrides=advice.overrides,
        what_fits=advice.what_fits,
    )


def total(run: Run) -> int:
    """All bytes that a run needs, margin included."""
    return sum(item.bytes for item in _items(run))


def _items(run: Run) -> tuple[MemoryItem, ...]:
    always = [*weights(run), *training(run)]
    step = peak_items(run, step_peak(run))
    if run.device == "cpu":
        return (*always, *step)
    margin = FRAGMENTATION_AT_LEAST + sum(item.bytes for item in step) // FRAGMENTATION
    return (
        *always,
        *step,
        MemoryItem("cuBLAS", CUBLAS_WORKSPACES, "step", "workspaces of the forward and the backward pass, 32 MiB each"),
        MemoryItem("CUDA context", CUDA_CONTEXT, "fixed", "driver and kernels, 0.5 GiB"),
        MemoryItem("margin", margin, "fixed", "fragmentation: 0.25 GiB and 2% of what comes and goes"),
    )


def _largest_micro_batch(run: Run, device_bytes: int) -> int:
    """The largest micro-batch that fits, 0 when none does."""
    sizes = range(1, MAX_MICRO_BATCH + 1)
    return bisect_left(sizes, True, key=lambda size: total(replace(run, micro_batch=size)) > device_bytes)
