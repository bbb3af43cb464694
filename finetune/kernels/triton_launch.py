"""How raw Triton kernels are launched."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on a CPU; set before triton is imported."""
ASSEMBLY = not INTERPRETED
"""The interpreter knows no assembly: a table is read instead."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches on the first tensor's device; an empty grid launches nothing."""
    if grid[0] == 0:
        return
    device = args[0].device
    # The interpreter of the tests runs on the CPU; entering the device that is current already would cost 10 us.
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


def launch_chained(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """As `launch`, for a kernel of a decoding step: it may be brought onto the GPU while the kernel before it ends.

    Programmatic dependent launch, from Hopper on: a step of Mixtral is 360 kernels in one graph, and takes 4.11 instead
    of 4.28 ms on an H100 (batch 1; 13.9 instead of 14.1 at 16, 20.9 instead of 20.7 at 64). The kernel takes CHAINED
    and begins with `wait_for_previous`.
    """
    if _can_chain(args[0].device):
        launch(kernel, grid, *args, CHAINED=True, launch_pdl=True, **options)
    else:
        launch(kernel, grid, *args, CHAINED=False, **options)


def tile_rows(count: int, matrices: int) -> int:
    """Rows of a tile: 8 is the tensor cores' least; wider where a matrix expects more, so that it is decoded once."""
    expected = count / matrices
    return 8 if expected <= 4.5 else 16 if expected <= 10 else 32


@functools.cache
def _can_chain(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """First of all: lets the next kernel come, and waits until what the ones before have written is there."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
