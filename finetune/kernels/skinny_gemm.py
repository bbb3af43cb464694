"""Skinny GEMM: products of few rows with quantized matrices, which are never written out dequantized (decoding).

The operators take rows as `Fp16Activations`: in the model's dtype for plain torch, and on CUDA beside it as fp16 with
the even columns first, which the kernel before has written for nothing (`triton_skinny_gemm.py` says why). The sums are
float32, as partial products over splits of the columns that the next kernel adds (`decode.add_norm`).

Errors against float64 on the dequantized weights, H100, shapes of Mixtral 8x7B: 3.0e-4 after SwiGLU and 1.6e-4 of the
down product alone; the same with bf16 weights and rows, 3.7e-3.

Leaves out gradients, and many rows: `kernels.frozen_experts` dequantizes once for all of them.

Shape suffixes: T rows, K choices, S = T * K, E experts, H hidden, F intermediate, P partial sums, O and I of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.nf4 import Nf4Weights
from finetune.kernels.operators import HAS_TRITON, define
from finetune.kernels.packed_experts import PackedExperts, dequantize_expert, packed_from
from finetune.kernels.rows import sort_by_expert

if HAS_TRITON:
    from finetune.kernels import triton_low_bit, triton_skinny_gemm


class Fp16Activations(NamedTuple):
    """Rows twice: x [T, I] in the model's dtype, and half fp16 [T, I], even columns first (CUDA) or [0] (plain)."""

    x: Tensor
    half: Tensor


def fp16_like(x: Tensor) -> Tensor:
    """Room for the fp16 form, where kernels will read it."""
    return x.new_empty(x.shape if runs_on_kernels(x) else 0, dtype=torch.float16)


def runs_on_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels serve these rows; float32 models keep their precision with plain torch."""
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float32


def to_fp16_activations(x_TI: Tensor) -> Fp16Activations:
    """The form that the operators take, of rows that no kernel has prepared."""
    if not runs_on_kernels(x_TI):
        return Fp16Activations(x_TI, fp16_like(x_TI))
    halves = torch.cat([x_TI[:, 0::2], x_TI[:, 1::2]], 1).float()
    return Fp16Activations(x_TI, halves.clamp(-16000.0, 16000.0).half())


# ---- matrices with one input --------------------------------------------------------------------------------------


def _matrices(tensors: list[Tensor]) -> list[Nf4Weights]:
    return [Nf4Weights(*tensors[first : first + 4]) for first in range(0, len(tensors), 4)]


def _rows_plain(x: Tensor, half: Tensor, matrices: list[Tensor]) -> Tensor:
    outs = [F.linear(x, dequantize_expert(weights, 0, x.dtype)).float() for weights in _matrices(matrices)]
    return torch.cat(outs, 1).unsqueeze(0)


def _empty_rows(x: Tensor, half: Tensor, matrices: list[Tensor]) -> Tensor:
    splits = triton_skinny_gemm.dense_splits(*x.shape) if runs_on_kernels(x) else 1
    out = sum(packed.shape[1] for packed in matrices[::4])
    return x.new_empty(splits, x.shape[0], out, dtype=torch.float32)


def _rows_cuda(x: Tensor, half: Tensor, matrices: list[Tensor]) -> Tensor:
    if not runs_on_kernels(x):
        return _rows_plain(x, half, matrices)
    out = _empty_rows(x, half, matrices)
    triton_skinny_gemm.dense(_matrices(matrices), half, out)
    return out


_rows = define(
    "nf4_skinny_gemm(Tensor x, Tensor half, Tensor[] matrices) -> Tensor",
    plain=_rows_plain,
    cuda=_rows_cuda,
    fake=_empty_rows,
)


def nf4_skinny_gemm(rows: Fp16Activations, matrices: Sequence[Nf4Weights]) -> Tensor:
    """float32 [P, T, O]: partial products x W^T of one to three matrices (E = 1), their outputs side by side.

    The outputs are multiples of 16.
    """
    return _rows(*rows, [tensor for matrix in matrices for tensor in matrix])


# ---- experts ------------------------------------------------------------------------------------------------------


def _experts_plain(x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    first, second = packed_from(gate_up), packed_from(down)
    out_SH = torch.zeros(index.numel(), x.shape[1], dtype=torch.float32, device=x.device)
    flat = index.flatten()
    for expert in flat.unique().tolist():
        choices = (flat == expert).nonzero().flatten()
        gate, up = F.linear(x[choices // index.shape[1]], dequantize_expert(first, expert, x.dtype)).chunk(2, -1)
        act = (F.silu(gate.float()) * up.float()).to(x.dtype)
        out_SH[choices] = F.linear(act, dequantize_expert(second, expert, x.dtype)).float()
    return out_SH.unsqueeze(0)


def _experts_cuda(x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    if not runs_on_kernels(x):
        return _experts_plain(x, half, index, gate_up, down)
    packed_gate_up, packed_down = packed_from(gate_up), packed_from(down)
    order_S = end_E = None
    if index.numel() > triton_skinny_gemm.VECTOR_CHOICES:
        rows = sort_by_expert(index, gate_up[0].shape[0])
        order_S, end_E = rows.order_S, rows.end_E
    act_SF = x.new_empty(index.numel(), packed_down.matrix_shape[1], dtype=torch.float16)
    if isinstance(packed_gate_up, Nf4Weights):
        triton_skinny_gemm.gate_up(packed_gate_up, half, index, order_S, end_E, act_SF)
    else:
        triton_low_bit.gate_up(*packed_gate_up, half, index, order_S, end_E, act_SF)
    out_PSH = _empty_experts(x, half, index, gate_up, down)
    if isinstance(packed_down, Nf4Weights):
        triton_skinny_gemm.down(packed_down, act_SF, index, order_S, end_E, out_PSH)
    else:
        triton_low_bit.down(*packed_down, act_SF, index, order_S, end_E, out_PSH)
    return out_PSH


def _empty_experts(x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    in_ = packed_from(down).matrix_shape[1]
    splits = triton_skinny_gemm.down_splits(index.numel(), in_) if runs_on_kernels(x) else 1
    return x.new_empty(splits, index.numel(), x.shape[1], dtype=torch.float32)


_experts = define(
    "skinny_experts(Tensor x, Tensor half, Tensor index, Tensor[] gate_up, Tensor[] down) -> Tensor",
    plain=_experts_plain,
    cuda=_experts_cuda,
    fake=_empty_experts,
)


def skinny_experts(rows: Fp16Activations, index_TK: Tensor, gate_up: PackedExperts, down: PackedExperts) -> Tensor:
    """float32 [P, T * K, H]: the partial products of each choice's expert, before the routing weights.

    Args:
        index_TK: int64, chosen experts, on the device; nothing is read on the host (CUDA, 16 bits).
        gate_up: E matrices [2F, H], gate's rows first.
        down: E matrices [H, F].
    """
    return _experts(*rows, index_TK.contiguous(), list(gate_up), list(down))
