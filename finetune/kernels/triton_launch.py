"""How raw Triton kernels are launched."""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on a CPU; set before triton is imported."""


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
