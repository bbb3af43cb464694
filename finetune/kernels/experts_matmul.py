"""The products of rows with the dequantized matrices of their experts, in two ways behind one call.

    grouped   dequantizes all experts into one workspace and multiplies it in one grouped GEMM. No host
              synchronization, few launches. Needs bfloat16 and compute capability 9 or 10: elsewhere torch's grouped
              GEMM is a loop that synchronizes. Workspace for Mixtral 8x7B: 1.88 GB.
    loop      dequantizes one expert at a time and multiplies its rows. Any device and dtype. Workspace: 0.24 GB.
              The host must know each expert's row count; it is copied once a layer, asynchronously, while the first
              expert is dequantized, and kept for the backward pass.

`choose_backend` states the rule. Behind it, one H100 (torch 2.11), LoRA steps of Mixtral 8x7B, grouped / loop:

    2 x 1024 tokens   310 / 432 ms    32 products a layer with new shapes each time: the host cannot keep up (cuBLAS
                                      takes 90 us to choose a kernel for a shape that it has not met)
    4 x 1024          497 / 473 ms
    8 x 1024          878 / 848 ms    cuBLAS's kernels are the faster ones, most of all where experts differ in load
    4 x 4096         1954 / 1934 ms

`finetune bench train --set model.experts_backend=loop` repeats these, `python -m bench kernels` those of one layer.

Shape suffixes: S rows sorted by expert, E experts, O and I a matrix's output and input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import DeviceError
from finetune.kernels.packed_experts import PackedExperts, dequantize_expert, dequantize_experts

Backend = Literal["grouped", "loop"]
BackendChoice = Literal["auto", "grouped", "loop"]
# From so many rows an expert on, a product takes the device longer than the host needs to launch the next.
ROWS_FOR_LOOP = 1024


def choose_backend(
    wanted: BackendChoice, device: torch.device, dtype: torch.dtype, *, rows: int, experts: int
) -> Backend:
    """The backend for `rows` (tokens * top_k) in `dtype`; auto is `grouped` where it runs and rows are neither many nor
    fewer than experts.

    Raises:
        DeviceError: `grouped` is asked for where it does not run.
    """
    able = device.type == "cuda" and dtype == torch.bfloat16 and _capability(device)[0] in (9, 10)
    if wanted == "grouped" and not able:
        raise DeviceError(
            f"the grouped backend of the experts does not run in {str(dtype).removeprefix('torch.')} on {device.type}",
            where="model.experts_backend",
            allowed="grouped: bfloat16 on a GPU of compute capability 9 or 10 (H100, H200, B200); loop: anywhere",
            fix="set model.experts_backend=auto",
        )
    if wanted == "auto":
        # With fewer rows than experts (decoding), the loop leaves out the experts that have none.
        return "grouped" if able and experts <= rows < ROWS_FOR_LOOP * experts else "loop"
    return wanted


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the device; of an H100 for a GPU that is not at hand, which a preflight may ask about."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


class ExpertsMatmul(Protocol):
    """Multiplies rows by their experts' matrices."""

    def forward(self, x_SI: Tensor, weights: PackedExperts) -> Tensor:
        """[S, O]: x W^T."""

    def backward(self, grad_SO: Tensor, weights: PackedExperts) -> Tensor:
        """[S, I]: the input's gradient, grad W."""


class GroupedMatmul:
    """All experts at once. `end_E` int32 [E] on the device: where each expert's rows end."""

    def __init__(self, end_E: Tensor):
        self.end_E = end_E

    def forward(self, x_SI: Tensor, weights: PackedExperts) -> Tensor:
        return F.grouped_mm(x_SI, dequantize_experts(weights, x_SI.dtype).transpose(-2, -1), offs=self.end_E)

    def backward(self, grad_SO: Tensor, weights: PackedExperts) -> Tensor:
        return F.grouped_mm(grad_SO, dequantize_experts(weights, grad_SO.dtype), offs=self.end_E)


class LoopMatmul:
    """One expert after the other; experts without rows are not dequantized."""

    def __init__(self, end_E: Tensor):
        self._ends_on_host = torch.empty(end_E.shape, dtype=end_E.dtype, pin_memory=end_E.is_cuda)
        self._ends_on_host.copy_(end_E, non_blocking=True)
        self._copied = torch.cuda.Event() if end_E.is_cuda else None
        if self._copied is not None:
            self._copied.record()
        self._ends: list[int] | None = None

    def forward(self, x_SI: Tensor, weights: PackedExperts) -> Tensor:
        out = x_SI.new_empty(x_SI.shape[0], weights.matrix_shape[0])
        for rows, weight in self._experts(weights, x_SI.dtype):
            torch.mm(x_SI[rows], weight.T, out=out[rows])
        return out

    def backward(self, grad_SO: Tensor, weights: PackedExperts) -> Tensor:
        out = grad_SO.new_empty(grad_SO.shape[0], weights.matrix_shape[1])
        for rows, weight in self._experts(weights, grad_SO.dtype):
            torch.mm(grad_SO[rows], weight, out=out[rows])
        return out

    def _experts(self, weights: PackedExperts, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(an expert's rows, its matrix) for every expert that has rows; the matrix is valid until the next one."""
        workspace = torch.empty(weights.matrix_shape, dtype=dtype, device=weights.packed.device)
        # Dequantized before the counts are asked for, so that the device works while the host waits for them.
        ready = self._ends is None and workspace.is_cuda
        if ready:
            dequantize_expert(weights, 0, dtype, out=workspace)
        start = 0
        for expert, end in enumerate(self._row_ends()):
            if end > start:
                if not (ready and expert == 0):
                    dequantize_expert(weights, expert, dtype, out=workspace)
                yield slice(start, end), workspace
            start = end

    def _row_ends(self) -> list[int]:
        if self._ends is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._ends = self._ends_on_host.tolist()
        return self._ends


def experts_matmul(backend: Backend, end_E: Tensor) -> ExpertsMatmul:
    return GroupedMatmul(end_E) if backend == "grouped" else LoopMatmul(end_E)
