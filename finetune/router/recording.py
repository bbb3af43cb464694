"""Keeps what every router said in the last forward pass: logits and chosen experts, layer by layer.

Why: comparing two models token by token (drift, fidelity) and looking at single tokens (favourites, coloured text)
need each token's routing, which sums do not hold. How: hooks on the decoder and its routers, as in `capture.py`; a
forward pass of the decoder replaces what the one before it left, and a recomputation in the backward pass, which runs
while the decoder does not, is not recorded.

Leaves out: sums over tokens (capture.py), padding (one row at a time has none), compiled decoders.

Shape suffixes: E experts, K experts per token, N tokens of the pass, row after row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from finetune.router.capture import find_routers


@dataclass
class Recording:
    """The routing of the last completed forward pass; empty before the first. New lists with each pass, safe to keep.

    Attributes:
        logits: router logits [N, E] of each layer, detached, in the router's dtype and on its device.
        indices: chosen experts int64 [N, K] of each layer, the most probable first.
    """

    logits: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def recorded_routing(model: nn.Module) -> Iterator[Recording]:
    """A `Recording` that follows the forward passes of a causal LM, bare or wrapped, while the context lasts.

    Raises:
        ModelError: the model has no routers, or more than one stack of them.
    """
    decoder, routers = find_routers(model)
    recording = Recording()
    passing: list[tuple[Tensor, Tensor] | None] | None = None

    def begin(_decoder: nn.Module, _args: Any) -> None:
        nonlocal passing
        passing = [None] * len(routers)

    def record(layer: int) -> Callable[..., None]:
        def hook(_router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if passing is not None:
                passing[layer] = output[0].detach(), output[2].detach()

        return hook

    def end(_decoder: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal passing
        if passing is not None:
            said = [layer for layer in passing if layer is not None]
            assert len(said) == len(routers), f"{len(said)} of {len(routers)} routers ran"
            recording.logits = [logits for logits, _ in said]
            recording.indices = [indices for _, indices in said]
        passing = None

    handles = [
        decoder.register_forward_pre_hook(begin),
        *(router.register_forward_hook(record(layer)) for layer, router in enumerate(routers)),
        decoder.register_forward_hook(end),
    ]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
