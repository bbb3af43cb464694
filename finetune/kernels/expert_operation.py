"""The mixture of frozen quantized experts as one differentiable operation.

    y_t = sum_k s_tk * W_d[e] (silu(W_g[e] x_t) * W_u[e] x_t),   e = index_tk

The experts get no gradient; the input and the routing weights do. The backward pass needs only products with the
dequantized weights (dX), and the routing weights' gradient comes out of the same product, without recomputing the
down projection: with a = silu(g) * u and v = W_d^T dy,

    ds_tk = <W_d^T dy_t, a_tk>,    da_tk = s_tk W_d^T dy_t.

ds is always computed, also for a frozen router: the router's logits depend on the hidden states.

How: the (token, choice) pairs are sorted by expert, multiplied by one of two backends, and a token's choices are summed
in float32. Kept for backward: the routing, always, and either the gate_up output h (2 * top_k * F elements a token) or
the input x, from which h is computed again. Dequantized weights are never kept.

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

What a surrounding checkpoint may recompute: only x. The routing and h are taken out of its reach by the caller
(`saved_tensors_hooks` around the call, see `moe/experts.py`); x comes from the node of `remember`, which the
checkpoint's recomputation reaches last, so that it stops before the experts.

Shapes: T tokens, K choices, S = T * K rows sorted by expert, E experts, H hidden, F intermediate, O and I a matrix's
output and input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.errors import DeviceError
from finetune.kernels.packed_experts import PackedExperts, dequantize_expert, dequantize_experts
from finetune.kernels.rows import combine_rows, gather_rows, sort_by_expert, swiglu_backward_, swiglu_forward

Backend = Literal["grouped", "loop"]
BackendChoice = Literal["auto", "grouped", "loop"]
# From so many multiply-adds on, an expert's gate_up product takes the device longer than the host needs to launch the
# next: 1,024 rows of Mixtral 8x7B's 4096 x 28672. Below it the device waits. OLMoE's 64 narrow experts at 8 x 1024
# tokens train at 43,300 tokens/s grouped and at 10,480 in the loop, Qwen3-30B-A3B's 128 at 4 x 4096 at 18,290 and 7,611
# (`finetune bench train`, H200).
PRODUCT_FOR_LOOP = 1024 * 4096 * 28672


def choose_backend(
    wanted: BackendChoice, device: torch.device, dtype: torch.dtype, *, rows: int, experts: int, weights: int
) -> Backend:
    """The backend for `rows` (tokens * top_k) in `dtype`; auto is `grouped` where it runs, unless an expert's
    product is large or rows are fewer than experts.

    Args:
        weights: of one expert's gate_up projection.

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
        return "grouped" if able and experts <= rows and rows * weights < PRODUCT_FOR_LOOP * experts else "loop"
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


# ---- the operation ---------------------------------------------------------------------------------------------------


def frozen_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    *,
    backend: Backend = "loop",
    keep_gate_up: bool = True,
    source: Any = None,
) -> Tensor:
    """Output [T, H] in x's dtype of the SwiGLU experts, differentiable in `x_TH` and `weight_TK`.

    Args:
        x_TH: float32, bfloat16 or float16; the matrix products run in this dtype.
        index_TK: int64, chosen experts.
        weight_TK: routing weights, any float dtype; used and differentiated in float32.
        gate_up: E matrices [2F, H], gate's rows first.
        down: E matrices [H, F].
        backend: see `choose_backend`.
        keep_gate_up: False computes the gate_up output again in the backward pass, with the same bits.
        source: the node of `remember(x)`, asked for x where `keep_gate_up` is False; without it x itself is kept.
    """
    return _FrozenExperts.apply(x_TH, index_TK, weight_TK, gate_up, down, backend, keep_gate_up, source)


def remember(x_TH: Tensor) -> tuple[Tensor, Any]:
    """x, and the autograd node that keeps it: a surrounding checkpoint drops and recomputes what the node keeps.

    The node is None where nothing needs a gradient.
    """
    remembered = _Remember.apply(x_TH)
    return remembered, remembered.grad_fn


class _Remember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up: PackedExperts, down: PackedExperts,
        backend: Backend, keep_gate_up: bool, source: Any,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x_TH.device.type, enabled=False):
            rows = sort_by_expert(index_TK, gate_up.packed.shape[0])
            products: ExpertsMatmul = (GroupedMatmul if backend == "grouped" else LoopMatmul)(rows.end_E)
            h_S2F = products.forward(gather_rows(x_TH, rows.token_S), gate_up)
            y_SH = products.forward(swiglu_forward(h_S2F), down)
            kept = h_S2F if keep_gate_up else x_TH if source is None else None
            ctx.save_for_backward(kept, weight_TK, *rows[:3])
            # Not saved as tensors: they are frozen and outlive the graph, and hooks on saved tensors (offloading,
            # checkpointing) must not copy gigabytes of weights.
            ctx.products, ctx.gate_up, ctx.down = products, gate_up, down
            ctx.keep_gate_up, ctx.source, ctx.dtype = keep_gate_up, source, x_TH.dtype
            return combine_rows(y_SH, rows.position_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight_TK, token_S, order_S, position_TK = ctx.saved_tensors
        with torch.autocast(grad_TH.device.type, enabled=False):
            if ctx.keep_gate_up:
                h_S2F = kept
            else:
                x_TH = kept if ctx.source is None else ctx.source.saved_tensors[0]
                h_S2F = ctx.products.forward(gather_rows(x_TH, token_S), ctx.gate_up)
                del x_TH
            del kept
            v_SF = ctx.products.backward(gather_rows(grad_TH.to(ctx.dtype), token_S), ctx.down)
            grad_weight_TK = swiglu_backward_(h_S2F, v_SF, weight_TK, order_S)
            del v_SF
            grad_x = combine_rows(ctx.products.backward(h_S2F, ctx.gate_up), position_TK, None)
        return grad_x.to(grad_TH.dtype), None, grad_weight_TK.to(weight_TK.dtype), None, None, None, None, None
