"""Causal attention over sequences that lie one after another in one row of tokens, without padding and without a mask.

Why: packed examples must not see each other, and a [T, T] mask would cost memory and the fast kernels. Rows of one
length are the same thing with evenly spaced boundaries, so training has one attention.

How: on CUDA in bfloat16 or float16, the flash attention that torch is built with. The values of `cu_seqlens` are never
read on the host, so nothing synchronizes, and key/value heads are not expanded. torch's own `varlen_attn` makes the
same two calls; what it cannot do is be reproducible: flash's backward adds up the gradient of the queries with atomics
unless `torch.use_deterministic_algorithms` is on while the backward operator runs, and a user who turns that on for
the whole run pays for it everywhere. Here the flag is on around this operator alone (`REPRODUCIBLE_BACKWARD`). It is a
flag of the process, not of the thread: another thread that launches kernels during these microseconds sees it too.
Everything else (CPU, float32, a head_dim that flash has no kernel for) takes the plain path, a loop of
`scaled_dot_product_attention` over the sequences, which is the reference as well. On CUDA it reads the boundaries on
the host.

Where the sequences are known to be of one length, the forward pass is cuDNN's, which is twice as fast on an H100 and
gives what flash's backward needs.

Kept for backward: q, k, v, the output and its logsumexp. Flash's backward takes, for the time it runs, float32
[T + 128 N, H, D] for the queries' gradient (times the SMs over N * H, rounded up) and keys' and values' gradients at
H heads in the compute dtype.

What it leaves out: dropout, position biases, a key/value cache, torch.compile (the graph breaks around it), AMD GPUs.

Shapes: T tokens, N sequences, H query heads, G key/value heads (H a multiple of G), D head_dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import deterministic

from finetune.private_api import cudnn_attention, flash_attention_backward, flash_attention_forward

REPRODUCIBLE_BACKWARD = True
"""Two runs with one seed give the same bits. False lets flash use atomics: faster for few long sequences."""


def varlen_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    *,
    window: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Output [T, H, D]: every token attends to itself and what stands before it in its own sequence.

    Under autocast the three are cast as `scaled_dot_product_attention` casts them.

    Args:
        cu_seqlens: int32 [N+1] on the same device, ascending from 0 to T; sequence i is cu_seqlens[i]:cu_seqlens[i+1].
            A sequence may be empty.
        max_length: at least the longest sequence's length.
        scale: factor on the scores.
        window: a token sees only the last `window` tokens, itself among them.
        rows: N, where the host knows that all sequences are of length T / N; a faster forward kernel may serve them.
    """
    dtype = compute_dtype(q_THD)
    q_THD, k_TGD, v_TGD = q_THD.to(dtype), k_TGD.to(dtype), v_TGD.to(dtype)
    assert cu_seqlens.dtype == torch.int32, cu_seqlens.dtype
    assert q_THD.shape[1] % k_TGD.shape[1] == 0, (q_THD.shape, k_TGD.shape)
    if flash_serves(q_THD.device, dtype, q_THD.shape[-1]):
        return _FlashVarlen.apply(q_THD, k_TGD, v_TGD, cu_seqlens, max_length, scale, window, rows)
    return varlen_attention_reference(q_THD, k_TGD, v_TGD, cu_seqlens, scale, window=window)


def varlen_attention_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, scale: float, *, window: int | None = None
) -> Tensor:
    """The same in plain torch, for any device and dtype; sequences of one length run as one batch."""
    lengths = cu_seqlens.diff().tolist()
    assert sum(lengths) == q_THD.shape[0], (lengths, q_THD.shape)
    alike = len(set(lengths)) == 1
    groups = [len(lengths) * lengths[0]] if alike else lengths
    outputs = []
    for q, k, v in zip(q_THD.split(groups), k_TGD.split(groups), v_TGD.split(groups), strict=True):
        rows = len(lengths) if alike else 1
        if not q.shape[0]:
            continue
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **_causal(q, window))
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if outputs else q_THD.clone()


def flash_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash attention runs here: an NVIDIA GPU from Ampere on, 16 bits, head_dim a multiple of 8."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and _has_flash(device.index)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `scaled_dot_product_attention` would work on x: autocast's where that is on, float64 apart."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@functools.cache
def _has_flash(index: int | None) -> bool:
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(index) >= (8, 0)
    )


@functools.cache
def _has_cudnn(index: int | None) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(index) >= (9, 0)


class _FlashVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cu_seqlens: Tensor,
        max_length: int,
        scale: float,
        window: int | None,
        rows: int | None,
    ) -> Tensor:
        # Strides are free but for the last; these copy only what a caller has laid out otherwise.
        qkv = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TGD, v_TGD)]
        boundaries: Tensor | None = cu_seqlens
        if rows is not None:  # flash knows rows of one length as [N, T / N, H, D]; without boundaries it is faster
            qkv, boundaries, max_length = [x.unflatten(0, (rows, -1)) for x in qkv], None, q_THD.shape[0] // rows
        if rows is not None and window is None and _cudnn_serves(qkv[0]):
            out, logsumexp = _cudnn_forward(qkv[0], qkv[1], qkv[2], scale)
            rng_state = torch.empty(2, dtype=torch.uint64, device=out.device)  # of a dropout that is not there
        else:
            out, logsumexp, rng_state, _, _ = flash_attention_forward(
                *qkv,
                boundaries,
                boundaries,
                max_length,
                max_length,
                0.0,  # dropout
                True,  # causal
                False,  # no debug mask
                scale=scale,
                **_flash_window(window),
            )
        ctx.save_for_backward(*qkv, out, logsumexp, rng_state, boundaries)
        ctx.max_length, ctx.scale, ctx.window = max_length, scale, window
        return out.reshape(q_THD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, rng_state, boundaries = ctx.saved_tensors
        unused = torch.empty(0, device=q.device)  # second half of the dropout state
        with reproducible() if REPRODUCIBLE_BACKWARD else contextlib.nullcontext():
            grads = flash_attention_backward(
                grad_THD.reshape(out.shape),
                q,
                k,
                v,
                out,
                logsumexp,
                boundaries,
                boundaries,
                ctx.max_length,
                ctx.max_length,
                0.0,  # dropout
                True,  # causal
                rng_state,
                unused,
                scale=ctx.scale,
                **_flash_window(ctx.window),
            )
        return *(grad.reshape(-1, *grad.shape[-2:]) for grad in grads), None, None, None, None, None


def _cudnn_serves(q_NLHD: Tensor) -> bool:
    # cuDNN builds a plan for every shape that it meets (tens of milliseconds), so not for rows of just any length.
    return (
        q_NLHD.shape[-1] <= 128
        and q_NLHD.shape[1] % 256 == 0
        and torch.backends.cuda.cudnn_sdp_enabled()
        and _has_cudnn(q_NLHD.device.index)
    )


def _cudnn_forward(q_NLHD: Tensor, k_NLGD: Tensor, v_NLGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, L, H, D] and logsumexp [N, H, L], as flash's.

    On an H100, 32 query and 8 key heads of 128: 0.16 ms instead of 0.40 for 8 x 1024 tokens, 0.91 instead of 1.95 for
    4 x 4096. Its backward kernel is faster too, but adds with atomics and cannot be told not to (torch 2.11).
    """
    q, k, v = (x.transpose(1, 2) for x in (q_NLHD, k_NLGD, v_NLGD))
    out, logsumexp, *_ = cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out.transpose(1, 2), logsumexp.squeeze(-1)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """torch's deterministic algorithms, without filling uninitialized memory, and then the settings as they were.

    By way of the debug mode, because `torch.use_deterministic_algorithms` sets the compiler's configuration as well.
    """
    settings: Any = deterministic  # a module with a property, which types cannot say
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def _flash_window(window: int | None) -> dict[str, int]:
    """Flash counts the tokens seen besides the query itself; -1 is without limit."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _causal(q_NHLD: Tensor, window: int | None) -> dict[str, Any]:
    length = q_NHLD.shape[2]
    if window is None or window >= length:
        return {"is_causal": True}
    position = torch.arange(length, device=q_NHLD.device)
    behind = position[:, None] - position[None, :]
    return {"attn_mask": (behind >= 0) & (behind < window)}
