"""The attention function "varlen" for transformers: packed, equally long and padded rows without a [T, T] mask.

Importing this file registers it with transformers; `attn_implementation="varlen"` then selects it. What it serves runs
as `kernels.varlen_attention` over sequences that lie one after another:

- packed rows: the sequences of `cu_seq_lens_q`, which TRL's padding-free collator sends, or of `position_ids`;
  `FullRows` says in the same way of a padding collator's batch that it has no padding;
- rows without a mask: one sequence a row;
- rows with a padding mask [B, T], before any cache is filled: in each row what stands before the first real token is a
  sequence of its own, so no real token sees it; what follows the last real token comes later, and causal attention
  hides it. So every real token, and every gradient of one, is exact for padding on either side, and the boundaries
  are computed on the device: neither a synchronization nor a mask for the masks that TRL's padding collator always
  sends. The outputs at padded positions differ from those under sdpa's mask, and both mean nothing: no loss and no
  router count (`router/capture.py` reads the mask itself) takes them in. A mask with a hole between real tokens has
  no such boundaries: it goes to sdpa where the host may look; on CUDA with gradients a device-side assertion stops it.

Everything else goes to transformers' own sdpa function with the mask that sdpa would get: decoding with a cache,
dropout, attention weights, custom masks, dtypes and head sizes without a flash kernel. Sliding windows are served.

How: transformers asks the mask function once a forward pass and hands its answer to every layer, where the attention
function meets the packing keywords that the mask function never sees. So the answer is a `LazyMask`: the boundaries as
far as they are known, and sdpa's mask only when a layer asks for it.

Once a forward pass transformers looks into `position_ids` for packing, on the host, even where the boundaries are
known; and it does not look at all when a cache is about to be filled. `read_packing`, a hook on the decoder, does it
instead: known boundaries cost no synchronization, and those that only `position_ids` tell cost one. Without the hook
all stays right, but packing told by `position_ids` alone then goes through sdpa's mask.

What it leaves out: bidirectional attention, chunked attention and continuous batching (all go to sdpa), torch.compile.

Shapes: B rows, T tokens a row, N sequences; tensors from transformers are [B, heads, T, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.kernels import compute_dtype, flash_serves, varlen_attention
from finetune.private_api import assert_on_device, attention_of

VARLEN = "varlen"
_SDPA_ONLY = ("output_attentions", "position_bias", "softcap", "s_aux", "cache")


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The attention function for `model.attn_implementation`: "auto" is "varlen" wherever it is served, else "sdpa".

    On the CPU the plain path serves it: without a mask of packed rows it does less work (forward and backward of 512
    tokens, 4 heads of 32, one core: 14 ms with the mask, 6 ms as 2 sequences, 3 ms as 8).
    """
    if name != "auto":
        return name
    return VARLEN if _serves(device, dtype, head_dim) else "sdpa"


def read_packing(model: PreTrainedModel) -> None:
    """Puts a hook on the decoder that tells the attention function how the rows are packed; see above."""
    model.base_model.register_forward_pre_hook(_tell_packing, with_kwargs=True)


class FullRows:
    """A collator that adds, to batches of another in which no row is padded, the boundaries of the rows.

    The collator runs where the mask can be read for nothing; on the device nobody may look.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.collator(examples)
        mask = batch.get("attention_mask")
        if mask is not None and "cu_seq_lens_q" not in batch and bool(mask.all()):
            rows, length = mask.shape
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.arange(rows + 1, dtype=torch.int32) * length
            batch["max_length_q"] = batch["max_length_k"] = length
        return batch


@dataclass(frozen=True)
class Sequences:
    """Boundaries in the flattened batch: int32 [N+1] on the device, and at least the longest length."""

    cu_seqlens: Tensor
    max_length: int
    rows: int | None = None  # the number of sequences, where all are known to be of one length


@dataclass
class LazyMask:
    """What the mask function answers: `sequences` where boundaries say it all, sdpa's mask for whoever asks.

    `generate` makes the mask of a static cache ahead, as if it were a tensor (`ndim`, `contiguous`), and the decoder
    then hands it back to the mask function in the place of a padding mask.
    """

    sequences: Sequences | None
    custom: bool
    window: int | None
    arguments: dict[str, Any]
    ndim: int = 4
    _made: tuple[Tensor | None, Tensor | None] | None = None

    def contiguous(self) -> LazyMask:
        return self

    def sdpa(self, cu_seqlens: Tensor | None) -> Tensor | None:
        """sdpa's mask, cut down to the given sequences if there are any; made once, for all layers."""
        if self._made is None or self._made[0] is not cu_seqlens:
            self._made = (cu_seqlens, self._make(cu_seqlens))
        return self._made[1]

    def _make(self, cu_seqlens: Tensor | None) -> Tensor | None:
        if cu_seqlens is None:
            return sdpa_mask(**self.arguments)
        mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        assert mask is not None
        rows, length = self.arguments["batch_size"], self.arguments["q_length"]
        position = torch.arange(rows * length, device=mask.device, dtype=torch.int32)
        sequence = torch.bucketize(position, cu_seqlens.to(mask.device), right=True).view(rows, 1, length)
        return mask & (sequence.unsqueeze(-1) == sequence.unsqueeze(-2))


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: LazyMask | Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> LazyMask | Tensor | None:
    """transformers' mask function for "varlen"; arguments as those of `sdpa_mask`."""
    if isinstance(attention_mask, LazyMask):
        return attention_mask
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    # A static cache counts in tensors, even when it is empty.
    offset = isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor) or q_offset != 0 or kv_offset != 0
    if q_length != kv_length or offset or "allow_is_bidirectional_skip" in kwargs:
        return sdpa_mask(**arguments)
    sequences = None
    if allow_is_causal_skip:
        if attention_mask is None or _is_one_value(attention_mask):
            sequences = _rows(batch_size, q_length, device)
        else:
            sequences = _padded_rows(attention_mask)
    window = local_size if local_size is not None and local_size < q_length else None
    return LazyMask(sequences, use_vmap, window, arguments)


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "varlen": output [B, T, heads, head_dim], and no weights."""
    packed = kwargs.get("cu_seq_lens_q")
    causal = module.is_causal if is_causal is None else is_causal
    mask: Tensor | None
    if isinstance(attention_mask, LazyMask):
        sequences = attention_mask.sequences
        if packed is not None:
            sequences = _packed(packed, kwargs.get("max_length_q"), query.shape[0], query.shape[2])
        if (
            sequences is not None
            and causal
            and not dropout
            and not attention_mask.custom
            # A model with chunks instead of a window gives no window to its attention.
            and attention_mask.window in (None, kwargs.get("sliding_window"))
            and all(kwargs.get(name) is None or kwargs[name] is False for name in _SDPA_ONLY)
            and query.shape[2] == key.shape[2]
            and query.shape[3] == value.shape[3]
            and _serves(query.device, compute_dtype(query), query.shape[3])
        ):
            return _varlen(query, key, value, sequences, scaling, attention_mask.window), None
        mask = attention_mask.sdpa(packed)
    else:
        mask = attention_mask
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float | None, window: int | None
) -> Tensor:
    # Projections lie as [B, T, heads, head_dim] in memory, so this moves nothing.
    q_THD, k_TGD, v_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out_THD = varlen_attention(
        q_THD,
        k_TGD,
        v_TGD,
        sequences.cu_seqlens.to(query.device, torch.int32),
        int(sequences.max_length),
        query.shape[3] ** -0.5 if scaling is None else scaling,
        window=window,
        rows=sequences.rows,
    )
    return out_THD.unflatten(0, (query.shape[0], query.shape[2]))


def _serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return device.type == "cpu" or flash_serves(device, dtype, head_dim)


def _rows(rows: int, length: int, device: torch.device | str) -> Sequences:
    """One sequence a row. Made anew each forward pass: a tensor kept from `inference_mode` could not train."""
    return Sequences(torch.arange(rows + 1, dtype=torch.int32, device=device) * length, length, rows)


def _packed(cu_seqlens: Tensor, max_length: int | None, rows: int, length: int) -> Sequences:
    """The given boundaries. As many sequences as rows, none longer than a row, fill the rows only if each is one."""
    alike = cu_seqlens.numel() - 1 == rows and max_length == length
    return Sequences(cu_seqlens, max_length or rows * length, rows if alike else None)


def _padded_rows(real_BT: Tensor) -> Sequences | None:
    """In each row what precedes the first real token, and the rest; None if there is padding between real tokens."""
    rows, length = real_BT.shape
    rises = (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(1) + real_BT[:, 0]
    whole = (rises <= 1).all()
    if real_BT.is_cuda and torch.is_grad_enabled():
        assert_on_device(whole, "attention_mask has padding between real tokens: use attn_implementation=sdpa")
    elif not whole:
        return None
    cu_seqlens = torch.arange(2 * rows + 1, dtype=torch.int32, device=real_BT.device) // 2 * length
    cu_seqlens[1::2] += real_BT.int().argmax(1)  # the first of equals
    return Sequences(cu_seqlens, length)


def _tell_packing(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Adds the boundaries that `position_ids` tell, and a mask without padding, at which transformers stops looking."""
    if attention_of(decoder.config) != VARLEN or len(args) > 1:
        return None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    rows, length = tokens.shape[:2]
    packing: dict[str, Any] = {}
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and kwargs.get("cu_seq_lens_q") is None:
        packing = _packing_of(position_ids.expand(rows, -1))
    unpadded = torch.ones((), dtype=torch.bool, device=tokens.device).expand(rows, length)
    return args, {**kwargs, **packing, "attention_mask": unpadded}


def _packing_of(position_BT: Tensor) -> dict[str, Any]:
    """Packing keywords where positions start again inside a row. Reads them on the host: one synchronization."""
    device, position_BT = position_BT.device, position_BT.cpu()
    rows, length = position_BT.shape
    begins_BT = position_BT.diff(prepend=position_BT[:, :1] - 2) != 1
    begins = begins_BT.flatten().nonzero().flatten()
    if len(begins) == rows:
        return {}
    cu_seqlens = torch.cat([begins, torch.tensor([rows * length])]).to(torch.int32)
    return {"cu_seq_lens_q": cu_seqlens.to(device), "max_length_q": int(cu_seqlens.diff().max())}


def _is_one_value(mask: Tensor) -> bool:
    """Whether the mask is a single value spread over its shape, as `_tell_packing` makes it: known without reading."""
    return mask.stride() == (0, 0)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)
