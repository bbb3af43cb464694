"""Counts where the router sent every real token, on the device, without slowing or changing the model.

How: while the decoder runs forward, every router's logits and choices are noted (hook.py); at its end few kernels over
all layers at once (`_add`) add them to the sums of the decoder's mode, train or eval. Padding is no text and is not
counted. A forward pass in training mode without gradients (a trainer's extra pass for its own metrics) is not training
and is not counted.

Real tokens: `attention_mask` [B, T] where it is given (with a key-value cache, its last T columns). Without it the
batch is packed or unpadded and every token is real, except the filler that TRL's padding-free collator appends for
`pad_to_multiple_of`: a tail of zeros in `position_ids`. A one-token document at the very end of a packed batch looks
the same and is left out too. Neighbours are real tokens of one document: positions that follow each other.

Prompt and completion: a pre-hook on the model takes the `labels` [B, T] it is called with; a real token that is itself
supervised belongs to the completion, any other to the prompt. Without labels all belong to the prompt. A pair of
neighbours belongs to where its second token does.

Everything stays on the device; only reading synchronizes with the host, and adds up over processes.

Leaves out: tensor parallelism (its ranks see the same tokens, so `tokens` is multiplied, ratios are right), rows that
accelerate repeats to even out the last evaluation batch of several processes (they are counted), compiled decoders.

Shape suffixes: L layers, E experts, B batch, T sequence, N = B * T tokens, K experts per token, P the two parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.router.hook import RouterListener
from finetune.router.metrics import RouterSums

Mode = Literal["train", "eval"]
Part = Literal["prompt", "completion"]
PARTS: tuple[Part, ...] = ("prompt", "completion")

# Elements of a tensor of probabilities that are worked on at a time: 4 MiB in float32. Mixtral's 32 layers at 8 x 1024
# tokens are two such groups of layers.
_GROUP_ELEMENTS = 2**20


@dataclass
class _DeviceSums:
    """`RouterSums` of both parts while they still live on the device; int64 and float64."""

    tokens_P: Tensor
    pairs_P: Tensor
    counts_LPE: Tensor
    same_first_LP: Tensor
    shared_any_LP: Tensor
    prob_LPE: Tensor
    scalar_L3P: Tensor  # squared logsumexp, entropy, largest probability

    @classmethod
    def zeros(cls, layers: int, experts: int, device: torch.device) -> _DeviceSums:
        parts = len(PARTS)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            zeros(parts),
            zeros(parts),
            zeros(layers, parts, experts),
            zeros(layers, parts),
            zeros(layers, parts),
            zeros(layers, parts, experts, dtype=torch.float64),
            zeros(layers, 3, parts, dtype=torch.float64),
        )

    def on_host(self, *, across_processes: bool) -> _DeviceSums:
        """On the host, added up over processes if asked: two collectives and two copies."""
        tensors = [getattr(self, each.name) for each in fields(self)]
        host = []
        for group in (tensors[:5], tensors[5:]):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            if across_processes and dist.is_available() and dist.is_initialized():
                dist.all_reduce(flat)
            pieces = flat.cpu().split([tensor.numel() for tensor in group])
            host += [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, group, strict=True)]
        return _DeviceSums(*host)

    def part(self, index: int, top_k: int) -> RouterSums:
        """One part's sums; call it on what `on_host` returned."""
        return RouterSums(
            counts=self.counts_LPE[:, index],
            prob_sum=self.prob_LPE[:, index],
            tokens=int(self.tokens_P[index]),
            top_k=top_k,
            z_sum=self.scalar_L3P[:, 0, index],
            entropy_sum=self.scalar_L3P[:, 1, index],
            top1_sum=self.scalar_L3P[:, 2, index],
            pairs=int(self.pairs_P[index]),
            same_first=self.same_first_LP[:, index],
            shared_any=self.shared_any_LP[:, index],
        )


@dataclass
class _Pass:
    """One forward pass of the decoder that is being counted."""

    mode: Mode
    real_BT: Tensor
    follows_BT: Tensor  # whether the token and the one before it are real and of one document
    labels_BT: Tensor | None
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # logits [N, E], chosen [N, K]


class RouterCapture(RouterListener):
    """Counts assignments and sums probabilities at every router of a causal LM.

    Args:
        model: the causal LM, bare or inside PEFT, DDP or FSDP.
        num_experts: experts per layer.
        top_k: experts per token.
    """

    def __init__(self, model: nn.Module, *, num_experts: int, top_k: int):
        super().__init__(model)
        self.num_experts, self.top_k = num_experts, top_k
        self._sums: dict[Mode, _DeviceSums] = {}
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def begin(self, call: Mapping[str, Any], labels: Tensor | None, *, training: bool) -> bool:
        if self._paused or (training and not torch.is_grad_enabled()):
            return False
        with torch.inference_mode(False), torch.no_grad():
            real_BT = real_tokens(call)
            follows_BT = _follows(real_BT, call.get("position_ids"))
            if labels is not None and labels.shape != real_BT.shape:
                labels = None  # not of these tokens: a prompt of virtual tokens, a part of a row
        self._pass = _Pass("train" if training else "eval", real_BT, follows_BT, labels)
        return True

    def hear(self, layer: int, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        self._pass.layers.append((logits_NE.detach(), chosen_NK.detach()))

    def end(self) -> None:
        mode, device = self._pass.mode, self._pass.real_BT.device
        # Sums must outlive an evaluation under inference_mode, whose tensors cannot be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            if mode not in self._sums:
                self._sums[mode] = _DeviceSums.zeros(self.layers, self.num_experts, device)
            _add(self._sums[mode], self._pass, self.num_experts, self.top_k)
        del self._pass

    # ---- reading ----------------------------------------------------------------------------------------

    def snapshot(self, mode: Mode, *, across_processes: bool = True) -> RouterSums:
        """Sums since the last `reset(mode)`, by default over all processes: every process must call it then."""
        parts = self.snapshot_parts(mode, across_processes=across_processes)
        return parts["prompt"] + parts["completion"]

    def snapshot_parts(self, mode: Mode, *, across_processes: bool = True) -> dict[Part, RouterSums]:
        """`snapshot`, prompt and completion tokens apart."""
        assert self.layers, "attach the capture before reading it"
        sums = self._sums.get(mode)
        if sums is None:
            sums = _DeviceSums.zeros(self.layers, self.num_experts, next(self.model.parameters()).device)
        host = sums.on_host(across_processes=across_processes)
        return {part: host.part(index, self.top_k) for index, part in enumerate(PARTS)}

    def reset(self, mode: Mode) -> None:
        """Starts the sums of a mode again."""
        self._sums.pop(mode, None)


def _add(sums: _DeviceSums, counted: _Pass, experts: int, top_k: int) -> None:
    """Adds a forward pass to the sums: groups of layers at a time, no host synchronization, no order to depend on."""
    device = sums.tokens_P.device
    real_N, follows_N = counted.real_BT.reshape(-1).to(device), counted.follows_BT.reshape(-1).to(device)
    supervised_N = (
        torch.zeros_like(real_N) if counted.labels_BT is None else (counted.labels_BT.to(device) != -100).reshape(-1)
    )
    part_N = supervised_N.long()
    real_PN = torch.stack([real_N & ~supervised_N, real_N & supervised_N])
    # The first token follows none; a pair is where its second token is.
    follows_PN = (real_PN & follows_N)[:, 1:]
    sums.tokens_P += real_PN.sum(1)
    sums.pairs_P += follows_PN.sum(1)
    # Integer sums of one-hot choices by scatter_add_: unlike bincount without a host synchronization.
    slot_N1, weight_NK = part_N.unsqueeze(1) * experts, real_N.long().unsqueeze(1).expand(-1, top_k)
    tokens = real_N.numel()
    group = max(1, _GROUP_ELEMENTS // (max(tokens, 1) * max(experts, top_k * top_k)))
    for first in range(0, len(counted.layers), group):
        layers = slice(first, first + group)
        # Layers may sit on several devices (a model split by device_map).
        logits_LNE = torch.stack([logits.to(device, non_blocking=True) for logits, _ in counted.layers[layers]])
        chosen_LNK = torch.stack([chosen.to(device, non_blocking=True) for _, chosen in counted.layers[layers]])
        count = chosen_LNK.shape[0]

        sums.counts_LPE[layers].reshape(count, -1).scatter_add_(
            1, (chosen_LNK + slot_N1).reshape(count, -1), weight_NK.reshape(1, -1).expand(count, -1)
        )
        before_LNK, after_LNK = chosen_LNK[:, :-1], chosen_LNK[:, 1:]
        same_LN = before_LNK[:, :, 0] == after_LNK[:, :, 0]
        shared_LN = (before_LNK.unsqueeze(3) == after_LNK.unsqueeze(2)).any(3).any(2)
        sums.same_first_LP[layers] += (same_LN.unsqueeze(1) & follows_PN).sum(2)
        sums.shared_any_LP[layers] += (shared_LN.unsqueeze(1) & follows_PN).sum(2)
        del before_LNK, after_LNK, chosen_LNK

        # Filled, not multiplied: the logits of padding may be NaN.
        logits_LNE = logits_LNE.float().masked_fill(~real_N.unsqueeze(1), 0.0)
        log_sum_LN = logits_LNE.logsumexp(2)
        probs_LNE = (logits_LNE - log_sum_LN.unsqueeze(2)).exp_()
        entropy_LN = log_sum_LN - logits_LNE.mul_(probs_LNE).sum(2)
        scalar_L3N = torch.stack([log_sum_LN.square(), entropy_LN, probs_LNE.amax(2)], dim=1)
        del logits_LNE
        for part, real in enumerate(real_PN):
            sums.scalar_L3P[layers, :, part] += (scalar_L3N * real).sum(2, dtype=torch.float64)
            sums.prob_LPE[layers, part] += (probs_LNE * real.unsqueeze(1)).sum(1, dtype=torch.float64)


def real_tokens(call: Mapping[str, Any]) -> Tensor:
    """Mask [B, T] of the tokens that are not padding, from the arguments of a decoder call."""
    tokens = call.get("input_ids")
    if tokens is None:
        tokens = call["inputs_embeds"]
    batch, length = tokens.shape[:2]
    mask, position_ids = call.get("attention_mask"), call.get("position_ids")
    if mask is not None:
        assert mask.dim() == 2, f"padding can be read from a [batch, length] attention mask, not from {mask.shape}"
        return mask[:, -length:].bool()
    real_BT = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if position_ids is not None:
        # Positions still to come, this one included, are all 0: filler. The first token of a row is always real.
        ahead_BT = position_ids.flip(1).cummax(dim=1).values.flip(1)
        real_BT[:, 1:] = (ahead_BT > 0)[:, 1:]
    return real_BT


def _follows(real_BT: Tensor, position_ids: Tensor | None) -> Tensor:
    """Whether [B, T] a token and the one before it are neighbours: both real and of one document."""
    follows_BT = torch.zeros_like(real_BT)
    follows_BT[:, 1:] = real_BT[:, 1:] & real_BT[:, :-1]
    if position_ids is not None:
        follows_BT[:, 1:] &= position_ids[:, 1:] == position_ids[:, :-1] + 1
    return follows_BT
