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
from finetune.kernels.operators import HAS_TRITON, operator, runs_on_kernels
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


def to_fp16_activations(x_TI: Tensor) -> Fp16Activations:
    """The form that the operators take, of rows that no kernel has prepared."""
    if not runs_on_kernels(x_TI):
        return Fp16Activations(x_TI, fp16_like(x_TI))
    halves = torch.cat([x_TI[:, 0::2], x_TI[:, 1::2]], 1).float()
    return Fp16Activations(x_TI, halves.clamp(-16000.0, 16000.0).half())


# ---- matrices with one input --------------------------------------------------------------------------------------


def nf4_skinny_gemm(rows: Fp16Activations, matrices: Sequence[Nf4Weights]) -> Tensor:
    """float32 [P, T, O]: partial products x W^T of one to three matrices (E = 1), their outputs side by side.

    The outputs are multiples of 16.
    """
    return _nf4_skinny_gemm(*rows, [tensor for matrix in matrices for tensor in matrix])


def _matrices(tensors: list[Tensor]) -> list[Nf4Weights]:
    return [Nf4Weights(*tensors[first : first + 4]) for first in range(0, len(tensors), 4)]


def _empty_sums(x: Tensor, half: Tensor, matrices: list[Tensor]) -> Tensor:
    splits = triton_skinny_gemm.dense_splits(*x.shape) if runs_on_kernels(x) else 1
    out = sum(packed.shape[1] for packed in matrices[::4])
    return x.new_empty(splits, x.shape[0], out, dtype=torch.float32)


def _launch_matrices(x: Tensor, half: Tensor, matrices: list[Tensor], out: Tensor) -> None:
    triton_skinny_gemm.dense(_matrices(matrices), half, out)


@operator(launch=HAS_TRITON and _launch_matrices, empty=_empty_sums, on_kernels=runs_on_kernels)
def _nf4_skinny_gemm(x: Tensor, half: Tensor, matrices: list[Tensor]) -> Tensor:
    outs = [F.linear(x, dequantize_expert(weights, 0, x.dtype)).float() for weights in _matrices(matrices)]
    return torch.cat(outs, 1).unsqueeze(0)


# ---- experts ------------------------------------------------------------------------------------------------------


def skinny_experts(rows: Fp16Activations, index_TK: Tensor, gate_up: PackedExperts, down: PackedExperts) -> Tensor:
    """float32 [P, T * K, H]: the partial products of each choice's expert, before the routing weights.

    Args:
        index_TK: int64, chosen experts, on the device; nothing is read on the host (CUDA, 16 bits).
        gate_up: E matrices [2F, H], gate's rows first.
        down: E matrices [H, F].
    """
    return _skinny_experts(*rows, index_TK.contiguous(), list(gate_up), list(down))


def _empty_products(x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    in_ = packed_from(down).matrix_shape[1]
    splits = triton_skinny_gemm.down_splits(index.numel(), in_) if runs_on_kernels(x) else 1
    return x.new_empty(splits, index.numel(), x.shape[1], dtype=torch.float32)


def _launch_experts(
    x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor], out: Tensor
) -> None:
    first, second = packed_from(gate_up), packed_from(down)
    kernels = triton_skinny_gemm.NF4 if isinstance(first, Nf4Weights) else triton_low_bit.LOW_BIT
    order_S = end_E = None
    if index.numel() > triton_skinny_gemm.VECTOR_CHOICES:
        _, order_S, _, end_E = sort_by_expert(index, gate_up[0].shape[0])
    act_SF = x.new_empty(index.numel(), second.matrix_shape[1], dtype=torch.float16)
    kernels.gate_up(first, half, index, order_S, end_E, act_SF)
    kernels.down(second, act_SF, index, order_S, end_E, out)


@operator(launch=HAS_TRITON and _launch_experts, empty=_empty_products, on_kernels=runs_on_kernels)
def _skinny_experts(x: Tensor, half: Tensor, index: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    first, second = packed_from(gate_up), packed_from(down)
    out_SH = torch.zeros(index.numel(), x.shape[1], dtype=torch.float32, device=x.device)
    flat = index.flatten()
    for expert in flat.unique().tolist():
        choices = (flat == expert).nonzero().flatten()
        gate, up = F.linear(x[choices // index.shape[1]], dequantize_expert(first, expert, x.dtype)).chunk(2, -1)
        act = (F.silu(gate.float()) * up.float()).to(x.dtype)
        out_SH[choices] = F.linear(act, dequantize_expert(second, expert, x.dtype)).float()
    return out_SH.unsqueeze(0)
