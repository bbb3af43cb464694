"""Counts where the router sent every real token, on the device, without slowing or changing the model.

Why: transformers returns router logits only by keeping all of them, and a plain hook on the router counts a token twice
under activation checkpointing and counts padding as if it were text.

How: a forward pre-hook on the decoder (the module that owns the layers; it is called as a module also below PEFT, DDP,
FSDP and TRL's fused LM head) opens a window and takes the mask of real tokens; a hook on each router adds that layer's
assignments and probabilities to the window; a forward hook on the decoder closes the window into the sums of the
decoder's mode, train or eval. Recomputation in the backward pass happens while no window is open, so it is not counted,
whichever checkpointing mode asked for it. A forward pass that raises never closes its window and counts nothing. A
forward pass in training mode without gradients (a trainer's extra pass for its own metrics) is not training and opens
no window.

Real tokens: `attention_mask` [B, T] where it is given (with a key-value cache, its last T columns). Without it the
batch is packed or unpadded and every token is real, except the filler that TRL's padding-free collator appends for
`pad_to_multiple_of`: a tail of zeros in `position_ids`. A one-token document at the very end of a packed batch looks
the same and is left out too.

Everything stays on the device; only `snapshot` synchronizes with the host, and adds up over processes.

Leaves out: tensor parallelism (its ranks see the same tokens, so `tokens` is multiplied, ratios are right), rows that
accelerate repeats to even out the last evaluation batch of several processes (they are counted), compiled decoders.

Shape suffixes: L layers, E experts, B batch, T sequence, N = B * T tokens, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finetune.arch import router_path
from finetune.errors import ModelError
from finetune.routing.metrics import RouterSums

Mode = Literal["train", "eval"]

# Path components that wrappers put between a module and its parent: FSDP, activation checkpointing, torch.compile.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
# The decoder's path inside a causal LM, as arch.py spells it.
_DECODER_PATH = router_path(0).partition(".layers.")[0]


@dataclass
class _DeviceSums:
    """`RouterSums` while it still lives on the device."""

    counts_LE: Tensor
    prob_sum_LE: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, layers: int, experts: int, device: torch.device) -> _DeviceSums:
        return cls(
            torch.zeros(layers, experts, dtype=torch.int64, device=device),
            torch.zeros(layers, experts, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def add_(self, other: _DeviceSums) -> None:
        self.counts_LE += other.counts_LE
        self.prob_sum_LE += other.prob_sum_LE
        self.tokens += other.tokens


@dataclass
class _Window:
    """One forward pass of the decoder that is being counted."""

    mode: Mode
    real_N: Tensor
    real_choices: Tensor  # int64 [N * K]
    sums: _DeviceSums


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
            decoder.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(self._close),
            *(
                router.register_forward_hook(lambda _router, _args, output, layer=layer: self._count(layer, output))
                for layer, router in enumerate(routers)
            ),
        ]

    def detach(self) -> None:
        """Takes the hooks off; what was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._window = [], None

    def __enter__(self) -> RouterCapture:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach()

    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._window = None
        if decoder.training and not torch.is_grad_enabled():
            return
        call = self._signature.bind_partial(*args, **kwargs).arguments
        # Sums must outlive an evaluation under inference_mode, whose tensors cannot be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            real_BT = _real_tokens(call)
            sums = _DeviceSums.zeros(self._layers, self.num_experts, real_BT.device)
            sums.tokens += real_BT.sum()
            real_N = real_BT.reshape(-1)
            choices = real_N.long().repeat_interleave(self.top_k)
        self._window = _Window("train" if decoder.training else "eval", real_N, choices, sums)

    def _count(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._window is None:
            return
        logits_NE, _, indices_NK = output
        sums = self._window.sums
        with torch.inference_mode(False), torch.no_grad():
            # A layer may sit on another device than the decoder's input (a model split by device_map).
            real_N = self._window.real_N.to(logits_NE.device, non_blocking=True)
            real_choices = self._window.real_choices.to(logits_NE.device, non_blocking=True)
            # scatter_add_ of integers: no host synchronization, unlike bincount, and no order to depend on.
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=logits_NE.device)
            counts_E.scatter_add_(0, indices_NK.reshape(-1), real_choices)
            # Filled, not multiplied: the logits of padding may be NaN.
            probs_NE = torch.softmax(logits_NE.float(), dim=-1).masked_fill(~real_N.unsqueeze(1), 0.0)
            sums.counts_LE[layer] += counts_E.to(sums.counts_LE.device, non_blocking=True)
            prob_sum_E = probs_NE.sum(dim=0, dtype=torch.float64)
            sums.prob_sum_LE[layer] += prob_sum_E.to(sums.prob_sum_LE.device, non_blocking=True)

    def _close(self, _decoder: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        window, self._window = self._window, None
        if window is None:
            return
        if window.mode in self._sums:
            with torch.inference_mode(False), torch.no_grad():
                self._sums[window.mode].add_(window.sums)
        else:
            self._sums[window.mode] = window.sums

    # ---- reading ----------------------------------------------------------------------------------------

    def snapshot(self, mode: Mode) -> RouterSums:
        """Sums since the last `reset(mode)`, over all processes: every process must call it."""
        assert self._layers, "attach the capture before reading it"
        sums = self._sums.get(mode)
        if sums is None:
            sums = _DeviceSums.zeros(self._layers, self.num_experts, next(self.model.parameters()).device)
        integers = torch.cat([sums.tokens, sums.counts_LE.reshape(-1)])
        prob_sum_LE = sums.prob_sum_LE.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(integers)
            dist.all_reduce(prob_sum_LE)
        integers = integers.cpu()
        return RouterSums(
            counts=integers[1:].reshape(self._layers, self.num_experts),
            prob_sum=prob_sum_LE.cpu(),
            tokens=int(integers[0]),
            top_k=self.top_k,
        )

    def reset(self, mode: Mode) -> None:
        """Starts the sums of a mode again."""
        self._sums.pop(mode, None)


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


def _real_tokens(call: Mapping[str, Any]) -> Tensor:
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
