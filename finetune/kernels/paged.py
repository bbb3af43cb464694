"""Attention of one new token a row over keys and values that lie in pages of a pool (PagedAttention, arXiv 2309.06180).

Rows join and leave at any step without moving what is cached: a row's page table says where its tokens lie. The new
token's key and value are written by the same launch that rotates its query and key; attention then runs in splits of
the pages (FlashDecoding), which are joined by their maxima.

Shape suffixes: T rows, H query heads, G key/value heads (H a multiple of G), D head_dim, L positions, P pages a row
or partial sums.
Pools: [pages, page, G, D] in the model's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, define
from finetune.kernels.skinny_gemm import Fp16Activations, fp16_like, runs_on_kernels

if HAS_TRITON:
    from finetune.kernels import triton_decode

NO_WINDOW = 2**30


def _rope_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, pages: Tensor, k: Tensor, v: Tensor, heads: int
) -> Tensor:
    page, groups, dim = k.shape[1:]
    heads_THD = qkv.sum(0).to(k.dtype).unflatten(1, (-1, dim))
    qk, value = heads_THD[:, : heads + groups], heads_THD[:, heads + groups :]
    where = position.long()
    turned = torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], -1)
    qk = qk * cos[where].unsqueeze(1).to(k.dtype) + turned * sin[where].unsqueeze(1).to(k.dtype)
    table = pages.long().gather(1, (where // page).unsqueeze(1)).squeeze(1)
    k[table, where % page] = qk[:, heads:]
    v[table, where % page] = value
    return qk[:, :heads].contiguous()


def _rope_cuda(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, pages: Tensor, k: Tensor, v: Tensor, heads: int
) -> Tensor:
    if not runs_on_kernels(k):
        return _rope_plain(qkv, cos, sin, position, pages, k, v, heads)
    q = k.new_empty(qkv.shape[1], heads, k.shape[3])
    triton_decode.rope_write(qkv, cos, sin, position, pages, k, v, q)
    return q


_rope = define(
    "rope_write(Tensor qkv, Tensor cos, Tensor sin, Tensor position, Tensor pages, Tensor(a!) k, Tensor(b!) v, "
    "int heads) -> Tensor",
    plain=_rope_plain,
    cuda=_rope_cuda,
    fake=lambda qkv, cos, sin, position, pages, k, v, heads: k.new_empty(qkv.shape[1], heads, k.shape[3]),
)


def rope_write(
    qkv_PTO: Tensor,
    cos_LD: Tensor,
    sin_LD: Tensor,
    position_T: Tensor,
    pages_TP: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
) -> Tensor:
    """Rotated queries [T, H, D]; rotated keys and the values are written to their rows' pages.

    Args:
        qkv_PTO: float32 [P, T, (H + 2G) * D], partial sums of queries, keys, values side by side.
        cos_LD, sin_LD: the rotary tables, both halves alike (RoFormer, arXiv 2104.09864).
        position_T: int32, where the new token stands in its row.
        pages_TP: int32, the pages of each row.
    """
    return _rope(qkv_PTO, cos_LD, sin_LD, position_T, pages_TP, k, v, heads)


def _attention_plain(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, position: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    for row, last in enumerate(position.tolist()):
        table = pages[row, : last // k.shape[1] + 1].long()
        seen = slice(max(0, last + 1 - window), last + 1)
        keys, values = (pool[table].flatten(0, 1)[seen].transpose(0, 1) for pool in (k, v))
        query = q[row].unsqueeze(1)
        out[row] = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], scale=scale, enable_gqa=True
        ).view(q.shape[1:])
    flat = out.flatten(1)
    return flat, fp16_like(flat)


def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, position: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    if not runs_on_kernels(q):
        return _attention_plain(q, k, v, pages, position, scale, window)
    out = torch.empty_like(q).flatten(1)
    half = fp16_like(out)
    triton_decode.paged_attention(q, k, v, pages, position, scale, window, out, half)
    return out, half


_attention = define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor position, float scale, int window) "
    "-> (Tensor, Tensor)",
    plain=_attention_plain,
    cuda=_attention_cuda,
    fake=lambda q, k, v, pages, position, scale, window: (
        torch.empty_like(q).flatten(1),
        fp16_like(torch.empty_like(q).flatten(1)),
    ),
)


def paged_attention(
    q_THD: Tensor,
    k: Tensor,
    v: Tensor,
    pages_TP: Tensor,
    position_T: Tensor,
    scale: float,
    *,
    window: int | None = None,
) -> Fp16Activations:
    """Rows [T, H * D]: each row's query over the keys at positions 0 to `position`, or the last `window` of them."""
    return Fp16Activations(
        *_attention(q_THD, k, v, pages_TP, position_T, scale, NO_WINDOW if window is None else window)
    )
