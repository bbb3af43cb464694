"""What every router says while the decoder runs forward, told to whoever listens.

Why: transformers returns router logits only by keeping all of them, and a plain hook on the router hears a pass twice
under activation checkpointing.

How: a forward pre-hook on the decoder (the module that owns the layers; it is called as a module also below PEFT, DDP,
FSDP and TRL's fused LM head) begins a pass, a hook on each router hands on the layer's logits and choices, which are
there anyway, and a forward hook on the decoder ends the pass. Recomputation in the backward pass happens while no pass
runs, so nobody hears it, whichever checkpointing mode asked for it. A pass that raises never ends, and the next one
begins afresh.

Leaves out: compiled decoders; what autograd keeps of a router (memory/activations.py).

Shape suffixes: B batch, T sequence, N = B * T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finetune.errors import ModelError
from finetune.moe import router_path
from finetune.private_api import WRAPPERS

# The decoder's path inside a causal LM, as arch.py spells it.
_DECODER_PATH = router_path(0).partition(".layers.")[0]


class RouterListener(ABC):
    """Hears the routers of a Mixtral, Qwen3-MoE or OLMoE causal LM; a subclass says what it makes of it.

    Use it as a context manager or with `attach` and `detach`; both may be repeated. The model itself is not changed.

    Args:
        model: the causal LM, bare or inside PEFT, DDP or FSDP.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = 0  # routers of the model, known once attached
        self._handles: list[RemovableHandle] = []
        self._labels: Tensor | None = None
        self._heard: int | None = None  # routers of the pass that runs, if it is listened to

    # ---- what a subclass says ---------------------------------------------------------------------------

    @abstractmethod
    def begin(self, call: Mapping[str, Any], labels: Tensor | None, *, training: bool) -> bool:
        """A pass of the decoder begins. Whether to listen to it.

        Args:
            call: the decoder's arguments by name.
            labels: int64 [B, T], where the model was called with them.
            training: the decoder's mode.
        """

    @abstractmethod
    def hear(self, layer: int, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        """What one router said: its logits in its own dtype and on its own device, and the experts (int64)."""

    @abstractmethod
    def end(self) -> None:
        """The pass is over; every router was heard once."""

    # ---- hooks ------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Puts the hooks on. Looks the modules up now, so that wrapping done since construction is seen.

        Raises:
            ModelError: the model has no routers, or more than one stack of them.
        """
        if self.attached:
            return
        decoder, routers = find_routers(self.model)
        self.layers = len(routers)
        signature = inspect.signature(decoder.forward)

        def called(_model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._labels = kwargs.get("labels")

        def opened(_decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            labels, self._labels = self._labels, None
            call = signature.bind_partial(*args, **kwargs).arguments
            self._heard = 0 if self.begin(call, labels, training=decoder.training) else None

        def closed(_decoder: nn.Module, _args: Any, _output: Any) -> None:
            heard, self._heard = self._heard, None
            if heard is not None:
                assert heard == self.layers, f"{heard} of {self.layers} routers ran"
                self.end()

        def said(layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if self._heard is not None:
                self._heard += 1
                self.hear(layer, output[0], output[2])

        self._handles = [
            # Before other hooks: attention.py adds a mask without padding, which would hide the filler of packed rows.
            self.model.register_forward_pre_hook(called, with_kwargs=True),
            decoder.register_forward_pre_hook(opened, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(closed),
            *(
                router.register_forward_hook(lambda _router, _args, output, layer=layer: said(layer, output))
                for layer, router in enumerate(routers)
            ),
        ]

    def detach(self) -> None:
        """Takes the hooks off; what was heard stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._heard, self._labels = [], None, None

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Recording(RouterListener):
    """The routing of the last completed pass, token by token; empty before the first.

    Each pass makes new lists, which are safe to keep. It is for comparing two models (drift, fidelity) and for single
    tokens, which sums do not show. Padding is not told apart: give one row at a time.

    Attributes:
        logits: router logits [N, E] of each layer, detached, in the router's dtype and on its device.
        indices: chosen experts int64 [N, K] of each layer, the most probable first.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.logits: list[Tensor] = []
        self.indices: list[Tensor] = []

    def begin(self, call: Mapping[str, Any], labels: Tensor | None, *, training: bool) -> bool:
        self._passing: list[tuple[Tensor, Tensor]] = []
        return True

    def hear(self, layer: int, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        self._passing.append((logits_NE.detach(), chosen_NK.detach()))

    def end(self) -> None:
        self.logits = [logits for logits, _ in self._passing]
        self.indices = [indices for _, indices in self._passing]


def find_routers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder and its routers in layer order, whatever wraps them."""
    # Parents come first in named_modules, so of a wrapper and what it wraps the inner one stays.
    modules = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
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
