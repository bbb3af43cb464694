"""What a decoding step does between its products, each as one operator: residual and norm, router, LoRA, attention.

At a handful of rows a launch costs more than its arithmetic (2 us of an H100's 3,000 in a step), so each operator is
one or two kernels of `triton_decode.py`; plain torch beside it is the truth, and what a CPU and float32 models run.

Attention is that of one new token a row over keys and values in pages of a pool (PagedAttention, arXiv 2309.06180).
Rows join and leave at any step without moving what is cached: a row's page table says where its tokens lie. The new
token's key and value are written by the same launch that rotates its query and key; attention then runs in splits of
the pages (FlashDecoding), which are joined by their maxima.

Shape suffixes: T rows (one token each), K choices, S = T * K, P partial sums or pages a row, H hidden or query heads,
E experts, N adapters, G key/value heads (H a multiple of G), D head_dim, L positions.
Pools: [pages, page, G, D] in the model's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, operator, runs_on_kernels
from finetune.kernels.skinny_gemm import Fp16Activations, fp16_like

if HAS_TRITON:
    from finetune.kernels import triton_decode

NO_WINDOW = 2**30


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


@operator(
    launch=HAS_TRITON and triton_decode.add_norm,
    empty=lambda residual, *rest: (torch.empty_like(residual), torch.empty_like(residual), fp16_like(residual)),
    on_kernels=runs_on_kernels,
)
def _add_norm(
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


def _empty_routes(
    x_TH: Tensor, gates_NEH: Tensor, which_T: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    index = torch.empty(x_TH.shape[0], top_k, dtype=torch.int64, device=x_TH.device)
    return index, torch.empty(x_TH.shape[0], top_k, dtype=torch.float32, device=x_TH.device)


@operator(launch=HAS_TRITON and triton_decode.route, empty=_empty_routes, on_kernels=runs_on_kernels)
def route(x_TH: Tensor, gates_NEH: Tensor, which_T: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Chosen experts int64 [T, K] and their weights float32 [T, K], the likeliest first.

    Where logits are not finite the weights are NaN; the experts are still ones that exist.

    Args:
        gates_NEH: the routers' weights; `which_T` int32 says whose a row goes by.
        normalize: a row's weights sum to one, as Mixtral's do.
    """
    rows = torch.arange(len(x_TH), device=x_TH.device)
    logits = torch.einsum("th,neh->tne", x_TH.to(gates_NEH.dtype), gates_NEH)[rows, which_T.long()]
    weight, index = logits.float().softmax(-1).topk(top_k, dim=-1)
    return index, weight / weight.sum(-1, keepdim=True) if normalize else weight


@operator(
    launch=HAS_TRITON and triton_decode.lora_rows,
    writes=["y_PTO"],
    on_kernels=lambda y_PTO, x_TI, *rest: runs_on_kernels(x_TI),
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
    rank = b_NOR.shape[2]
    for adapter in range(a_NRI.shape[0]):
        rows = (which_T == adapter + 1).nonzero().flatten()
        if len(rows):
            t_TSR = (x_TI[rows].to(a_NRI.dtype) @ a_NRI[adapter].T).float().unflatten(1, (-1, rank))
            y_PTO[0, rows] += torch.einsum("tor,or->to", t_TSR[:, segment_O.long()], b_NOR[adapter].float())
            y_PTO[:, rows] *= magnitude_NO[adapter]


@operator(
    launch=HAS_TRITON and triton_decode.rope_write,
    empty=lambda qkv, cos, sin, position, pages, k, v, heads: k.new_empty(qkv.shape[1], heads, k.shape[3]),
    writes=["k", "v"],
    on_kernels=lambda qkv, cos, sin, position, pages, k, *rest: runs_on_kernels(k),
)
def rope_write(
    qkv_PTO: Tensor, cos_LD: Tensor, sin_LD: Tensor, position_T: Tensor, pages_TP: Tensor, k: Tensor, v: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """Rotated queries [T, H, D]; rotated keys and the values are written to their rows' pages.

    Args:
        qkv_PTO: float32 [P, T, (H + 2G) * D], partial sums of queries, keys, values side by side.
        cos_LD, sin_LD: the rotary tables, both halves alike (RoFormer, arXiv 2104.09864).
        position_T: int32, where the new token stands in its row.
        pages_TP: int32, the pages of each row.
        heads: H.
    """
    page, groups, dim = k.shape[1:]
    heads_THD = qkv_PTO.sum(0).to(k.dtype).unflatten(1, (-1, dim))
    qk, value = heads_THD[:, : heads + groups], heads_THD[:, heads + groups :]
    where = position_T.long()
    turned = torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], -1)
    qk = qk * cos_LD[where].unsqueeze(1).to(k.dtype) + turned * sin_LD[where].unsqueeze(1).to(k.dtype)
    table = pages_TP.long().gather(1, (where // page).unsqueeze(1)).squeeze(1)
    k[table, where % page] = qk[:, heads:]
    v[table, where % page] = value
    return qk[:, :heads].contiguous()


def paged_attention(
    q_THD: Tensor, k: Tensor, v: Tensor, pages_TP: Tensor, position_T: Tensor, scale: float, *,
    window: int | None = None,
) -> Fp16Activations:  # fmt: skip
    """Rows [T, H * D]: each row's query over the keys at positions 0 to `position`, or the last `window` of them."""
    limit = NO_WINDOW if window is None else window
    return Fp16Activations(*_paged_attention(q_THD, k, v, pages_TP, position_T, scale, limit))


def _empty_attention(q_THD: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q_THD).flatten(1)
    return out, fp16_like(out)


@operator(launch=HAS_TRITON and triton_decode.paged_attention, empty=_empty_attention, on_kernels=runs_on_kernels)
def _paged_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, position: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out, half = _empty_attention(q)
    for row, last in enumerate(position.tolist()):
        table = pages[row, : last // k.shape[1] + 1].long()
        seen = slice(max(0, last + 1 - window), last + 1)
        keys, values = (pool[table].flatten(0, 1)[seen].transpose(0, 1) for pool in (k, v))
        query = q[row].unsqueeze(1)
        attended = F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale, enable_gqa=True)
        out[row] = attended.flatten()
    return out, half
