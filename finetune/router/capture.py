"""Counts where the router sent every real token, on the device, without slowing or changing the model.

Why: transformers returns router logits only by keeping all of them, and a plain hook on the router counts a token twice
under activation checkpointing and counts padding as if it were text.

How: a forward pre-hook on the decoder (the module that owns the layers; it is called as a module also below PEFT, DDP,
FSDP and TRL's fused LM head) opens a window and takes the mask of real tokens; a hook on each router notes the layer's
logits and choices, which are there anyway; a forward hook on the decoder closes the window: few kernels over all layers
at once (`_add`) add it to the sums of the decoder's mode, train or eval. Recomputation in the backward pass happens
while no window is open, so it is not counted, whichever checkpointing mode asked for it. A forward pass that raises
never closes its window and counts nothing. A forward pass in training mode without gradients (a trainer's extra pass
for its own metrics) is not training and opens no window.

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
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finetune.errors import ModelError
from finetune.moe import router_path
from finetune.router.metrics import RouterSums

Mode = Literal["train", "eval"]
Part = Literal["prompt", "completion"]
PARTS: tuple[Part, ...] = ("prompt", "completion")

# Path components that wrappers put between a module and its parent: FSDP, activation checkpointing, torch.compile.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
# The decoder's path inside a causal LM, as arch.py spells it.
_DECODER_PATH = router_path(0).partition(".layers.")[0]


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
class _Window:
    """One forward pass of the decoder that is being counted."""

    mode: Mode
    real_BT: Tensor
    follows_BT: Tensor  # whether the token and the one before it are real and of one document
    labels_BT: Tensor | None
    layers: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)  # logits [N, E], chosen [N, K]


class RouterCapture:
    """Counts assignments and sums probabilities at every router of a Mixtral, Qwen3-MoE or OLMoE causal LM.

    Use it as a context manager or with `attach` and `detach`; both may be repeated. The model itself is not changed.

    Args:
        model: the causal LM, bare or inside PEFT, DDP or FSDP.
        num_experts: experts per layer.
        top_k: experts per token.
    """

    def __init__(self, model: nn.Module, *, num_experts: int, top_k: int):
        self.model, self.num_experts, self.top_k = model, num_experts, top_k
        self._handles: list[RemovableHandle] = []
        self._layers = 0
        self._sums: dict[Mode, _DeviceSums] = {}
        self._window: _Window | None = None
        self._labels: Tensor | None = None
        self._paused = False

    # ---- hooks ------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Puts the hooks on. Looks the modules up now, so that wrapping done since construction is seen."""
        if self.attached:
            return
        decoder, routers = find_routers(self.model)
        self._layers = len(routers)
        self._signature = inspect.signature(decoder.forward)
        self._handles = [
            # Before other hooks: attention.py adds a mask without padding, which would hide the filler of packed rows.
            self.model.register_forward_pre_hook(self._called, with_kwargs=True),
            decoder.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(self._close),
            *(
                router.register_forward_hook(lambda _router, _args, output, layer=layer: self._note(layer, output))
                for layer, router in enumerate(routers)
            ),
        ]

    def detach(self) -> None:
        """Takes the hooks off; what was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._window, self._labels = [], None, None

    def __enter__(self) -> RouterCapture:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _called(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels")

    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._window = None
        labels_BT, self._labels = self._labels, None
        if self._paused or (decoder.training and not torch.is_grad_enabled()):
            return
        call = self._signature.bind_partial(*args, **kwargs).arguments
        with torch.inference_mode(False), torch.no_grad():
            real_BT = real_tokens(call)
            follows_BT = _follows(real_BT, call.get("position_ids"))
            if labels_BT is not None and labels_BT.shape != real_BT.shape:
                labels_BT = None  # not of these tokens: a prompt of virtual tokens, a part of a row
        self._window = _Window(
            "train" if decoder.training else "eval", real_BT, follows_BT, labels_BT, [None] * self._layers
        )

    def _note(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._window is not None:
            logits_NE, _, chosen_NK = output
            self._window.layers[layer] = logits_NE.detach(), chosen_NK.detach()

    def _close(self, _decoder: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        window, self._window = self._window, None
        if window is None:
            return
        # Sums must outlive an evaluation under inference_mode, whose tensors cannot be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            device = window.real_BT.device
            if window.mode not in self._sums:
                self._sums[window.mode] = _DeviceSums.zeros(self._layers, self.num_experts, device)
            _add(self._sums[window.mode], window, self.num_experts, self.top_k)

    # ---- reading ----------------------------------------------------------------------------------------

    def snapshot(self, mode: Mode, *, across_processes: bool = True) -> RouterSums:
        """Sums since the last `reset(mode)`, by default over all processes: every process must call it then."""
        parts = self.snapshot_parts(mode, across_processes=across_processes)
        return parts["prompt"] + parts["completion"]

    def snapshot_parts(self, mode: Mode, *, across_processes: bool = True) -> dict[Part, RouterSums]:
        """`snapshot`, prompt and completion tokens apart."""
        assert self._layers, "attach the capture before reading it"
        sums = self._sums.get(mode)
        if sums is None:
            sums = _DeviceSums.zeros(self._layers, self.num_experts, next(self.model.parameters()).device)
        host = sums.on_host(across_processes=across_processes)
        return {part: host.part(index, self.top_k) for index, part in enumerate(PARTS)}

    def reset(self, mode: Mode) -> None:
        """Starts the sums of a mode again."""
        self._sums.pop(mode, None)


def _add(sums: _DeviceSums, window: _Window, experts: int, top_k: int) -> None:
    """Adds a forward pass to the sums: groups of layers at a time, no host synchronization, no order to depend on."""
    device = sums.tokens_P.device
    real_N, follows_N = window.real_BT.reshape(-1).to(device), window.follows_BT.reshape(-1).to(device)
    learnt_N = (
        torch.zeros_like(real_N) if window.labels_BT is None else (window.labels_BT.to(device) != -100).reshape(-1)
    )
    part_N = learnt_N.long()
    real_PN = torch.stack([real_N & ~learnt_N, real_N & learnt_N])
    # The first token follows none; a pair is where its second token is.
    follows_PN = (real_PN & follows_N)[:, 1:]
    sums.tokens_P += real_PN.sum(1)
    sums.pairs_P += follows_PN.sum(1)
    # Integer sums of one-hot choices by scatter_add_: unlike bincount without a host synchronization.
    slot_N1, weight_NK = part_N.unsqueeze(1) * experts, real_N.long().unsqueeze(1).expand(-1, top_k)
    tokens = real_N.numel()
    group = max(1, _GROUP_ELEMENTS // (max(tokens, 1) * max(experts, top_k * top_k)))
    noted = [layer for layer in window.layers if layer is not None]
    assert len(noted) == len(window.layers), f"{len(noted)} of {len(window.layers)} routers ran"
    for first in range(0, len(noted), group):
        layers = slice(first, first + group)
        # Layers may sit on several devices (a model split by device_map).
        logits_LNE = torch.stack([logits.to(device, non_blocking=True) for logits, _ in noted[layers]])
        chosen_LNK = torch.stack([chosen.to(device, non_blocking=True) for _, chosen in noted[layers]])
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


def find_routers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder and its routers in layer order, whatever wraps them."""
    # Parents come first in named_modules, so of a wrapper and what it wraps the inner one stays.
    modules = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
    }
    first = router_path(0)
    prefixes = [name.removesuffix(first) for name in modules if name == first or name.endswith(f".{first}")]
    if len(prefixes) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(prefixes)} stacks of layers with a router, so there is nothing to watch",
            where=f"no single module is called {first}",
            allowed="Mixtral, Qwen3-MoE and OLMoE causal language models of transformers >= 5.17",
            fix="switch router logging off (router.log: false) or use one of these models",
        )
    prefix = prefixes[0]
    routers: list[nn.Module] = []
    while (path := prefix + router_path(len(routers))) in modules:
        routers.append(modules[path])
    return modules[prefix + _DECODER_PATH], routers


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
