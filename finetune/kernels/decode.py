"""What a decoding step does between its products, each as one operator: residual and norm, router, LoRA.

At a handful of rows a launch costs more than its arithmetic (2 us of an H100's 3,000 in a step), so each operator is
one or two kernels of `triton_decode.py`; plain torch beside it is the truth, and what a CPU and float32 models run.

Shape suffixes: T rows (one token each), K choices, S = T * K, P partial sums, H hidden, E experts, N adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, define
from finetune.kernels.skinny_gemm import Fp16Activations, fp16_like, runs_on_kernels

if HAS_TRITON:
    from finetune.kernels import triton_decode


# ---- residual and norm --------------------------------------------------------------------------------------------


def _add_norm_plain(
    residual: Tensor, delta: Tensor, weight: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = residual.clone()
    if delta.shape[0]:
        summed_SH = delta.sum(0)
        if weight is not None:
            summed_SH = (summed_SH.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(1)
        total += summed_SH.to(total.dtype)
    x = total.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(total.dtype)
    out = norm.to(total.dtype) * normed
    return total, out, fp16_like(out)


def _add_norm_cuda(
    residual: Tensor, delta: Tensor, weight: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_on_kernels(residual):
        return _add_norm_plain(residual, delta, weight, norm, eps)
    outputs = torch.empty_like(residual), torch.empty_like(residual), fp16_like(residual)
    triton_decode.add_norm(residual, delta, weight, norm, eps, *outputs)
    return outputs


_add_norm = define(
    "add_norm(Tensor residual, Tensor delta, Tensor? weight, Tensor norm, float eps) -> (Tensor, Tensor, Tensor)",
    plain=_add_norm_plain,
    cuda=_add_norm_cuda,
    fake=lambda residual, delta, weight, norm, eps: (
        torch.empty_like(residual),
        torch.empty_like(residual),
        fp16_like(residual),
    ),
)


def add_norm(
    residual_TH: Tensor, delta_PSH: Tensor, weight_TK: Tensor | None, norm_H: Tensor, eps: float
) -> tuple[Tensor, Fp16Activations]:
    """The residual stream after a block, and its RMSNorm (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        residual_TH: contiguous, in the model's dtype.
        delta_PSH: float32 partial sums of the block's output; S = T without `weight_TK`, else T * K. P may be 0.
        weight_TK: float32 routing weights.
        norm_H: the norm's weight.
    """
    total, out, half = _add_norm(residual_TH, delta_PSH, weight_TK, norm_H, eps)
    return total, Fp16Activations(out, half)


# ---- router -------------------------------------------------------------------------------------------------------


def _route_plain(x: Tensor, gates: Tensor, which: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("th,neh->tne", x.to(gates.dtype), gates)[torch.arange(len(x), device=x.device), which.long()]
    weight, index = logits.float().softmax(-1).topk(top_k, dim=-1)
    return index, weight / weight.sum(-1, keepdim=True) if normalize else weight


def _empty_routes(x: Tensor, gates: Tensor, which: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    index = torch.empty(x.shape[0], top_k, dtype=torch.int64, device=x.device)
    return index, torch.empty(x.shape[0], top_k, dtype=torch.float32, device=x.device)


def _route_cuda(x: Tensor, gates: Tensor, which: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    if not runs_on_kernels(x):
        return _route_plain(x, gates, which, top_k, normalize)
    index, weight = _empty_routes(x, gates, which, top_k, normalize)
    triton_decode.route(x, gates, which, normalize, index, weight)
    return index, weight


_route = define(
    "route(Tensor x, Tensor gates, Tensor which, int top_k, bool normalize) -> (Tensor, Tensor)",
    plain=_route_plain,
    cuda=_route_cuda,
    fake=_empty_routes,
)


def route(x_TH: Tensor, gates_NEH: Tensor, which_T: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Chosen experts int64 [T, K] and their weights float32 [T, K], the likeliest first.

    Of logits that are not finite the weights are NaN; the experts are some of those that there are.

    Args:
        gates_NEH: the routers' weights; `which_T` int32 says whose a row goes by.
        normalize: a row's weights sum to one, as Mixtral's do.
    """
    return _route(x_TH, gates_NEH, which_T, top_k, normalize)


# ---- LoRA ---------------------------------------------------------------------------------------------------------


def _lora_plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, segment: Tensor, which: Tensor) -> None:
    rank = b.shape[2]
    for adapter in range(a.shape[0]):
        rows = (which == adapter + 1).nonzero().flatten()
        if len(rows):
            t_TSR = (x[rows].to(a.dtype) @ a[adapter].T).float().unflatten(1, (-1, rank))
            update_TO = torch.einsum("tor,or->to", t_TSR[:, segment.long()], b[adapter].float())
            y[0, rows] += update_TO
            y[:, rows] *= magnitude[adapter]


def _lora_cuda(y: Tensor, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, segment: Tensor, which: Tensor) -> None:
    if not runs_on_kernels(x):
        return _lora_plain(y, x, a, b, magnitude, segment, which)
    return triton_decode.lora_rows(y, x, a, b, magnitude, segment, which)


_lora = define(
    "lora_rows(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor magnitude, Tensor segment, Tensor which) -> ()",
    plain=_lora_plain,
    cuda=_lora_cuda,
    fake=lambda y, x, a, b, magnitude, segment, which: None,
)


def lora_rows(
    y_PTO: Tensor, x_TI: Tensor, a_NRI: Tensor, b_NOR: Tensor, magnitude_NO: Tensor, segment_O: Tensor, which_T: Tensor
) -> None:
    """Adds the update of each row's adapter to float32 partial sums `y` [P, T, O] in place: (y + B A x) * magnitude.

    Several projections of one input go at once: their outputs side by side, their A below each other.

    Args:
        a_NRI: of N adapters, the rank's rows of every projection.
        b_NOR: [N, O, rank], LoRA's scaling in it.
        magnitude_NO: float32; DoRA's magnitude over its norm (arXiv 2402.09353, equation 5), else 1.
        segment_O: int32, the projection that an output belongs to.
        which_T: int32, 0 for none, n for adapter n - 1.
    """
    _lora(y_PTO, x_TI, a_NRI, b_NOR, magnitude_NO, segment_O, which_T)
