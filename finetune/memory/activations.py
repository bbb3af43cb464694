"""What the backward pass keeps and what it computes again, layer by layer.

Why: keeping everything does not fit a large micro-batch, recomputing everything costs a third of a step. Between them
the two large things of a layer are kept or not each for itself: the gate_up output of its experts, and what its
attention and norms need. How many layers keep which is planned from the memory at hand.

How: `plan_activations` searches the plan that saves most time among those that fit; what fits is asked of the caller,
so that this file knows no bytes. Keeps go to the last layers: their memory is free again when the backward pass comes
to the early layers and recomputes those. `apply_plan` switches transformers' own layer checkpointing (never
reentrant) on in the layers that recompute their attention and tells the experts whether to keep their gate_up output.

Exactness: a recomputation repeats the same kernels on the same input, and the routing is not left to it. Computed
again with one bit of noise, a router may choose other experts than the forward pass did; so whatever the routers save
for backward (probabilities and indices, a few bytes a token) is taken out of the checkpoint's reach, and the experts
do the same for their own (`moe/experts.py`). Only the input of a router that trains, which is as large as the layer's
own, is dropped and recomputed where a checkpoint says so.

Leaves out: which bytes and seconds a keep is worth (`memory/`), FSDP's own checkpointing, offloading.
"""

from __future__ import annotations

import contextlib
import warnings
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from finetune.kernels import remember
from finetune.moe import MoeArch, experts_path, layer_path, router_path


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps for its backward pass besides its input and its routing."""

    keep_attention: bool
    keep_gate_up: bool


@dataclass(frozen=True)
class ActivationPlan:
    """What each layer keeps, first layer first."""

    layers: tuple[LayerPlan, ...]

    @classmethod
    def full(cls, layers: int) -> ActivationPlan:
        """Full checkpointing: every layer keeps its input and its routing, nothing else."""
        return cls.last(layers, attention=0, gate_up=0)

    @classmethod
    def none(cls, layers: int) -> ActivationPlan:
        """No checkpointing: every layer keeps everything."""
        return cls.last(layers, attention=layers, gate_up=layers)

    @classmethod
    def last(cls, layers: int, *, attention: int, gate_up: int) -> ActivationPlan:
        """The last `attention` and the last `gate_up` layers keep theirs."""
        assert 0 <= attention <= layers, attention
        assert 0 <= gate_up <= layers, gate_up
        return cls(tuple(LayerPlan(i >= layers - attention, i >= layers - gate_up) for i in range(layers)))

    @property
    def attention_layers(self) -> int:
        return sum(layer.keep_attention for layer in self.layers)

    @property
    def gate_up_layers(self) -> int:
        return sum(layer.keep_gate_up for layer in self.layers)

    def __str__(self) -> str:
        return (
            f"{self.gate_up_layers} of {len(self.layers)} layers keep the gate_up output, "
            f"{self.attention_layers} keep attention"
        )


def plan_activations(
    layers: int, fits: Callable[[ActivationPlan], bool], *, attention_cost: float, gate_up_cost: float
) -> ActivationPlan:
    """The plan that saves most recomputation among those that fit; full checkpointing when none does.

    Args:
        fits: whether a plan's peak fits. A plan that keeps attention in more layers must not need less.
        attention_cost: what recomputing one layer's attention and norms costs, in any unit.
        gate_up_cost: what recomputing one layer's gate_up output costs, in the same unit.
    """
    best, most = ActivationPlan.full(layers), -1.0
    for gate_up in range(layers + 1):
        plans = [ActivationPlan.last(layers, attention=attention, gate_up=gate_up) for attention in range(layers + 1)]
        attention = bisect_left(plans, True, key=lambda plan: not fits(plan)) - 1
        saved = attention * attention_cost + gate_up * gate_up_cost
        if attention >= 0 and saved > most:
            best, most = plans[attention], saved
    return best


def apply_plan(model: nn.Module, arch: MoeArch, plan: ActivationPlan) -> None:
    """Makes the training steps of a causal LM, bare or inside PEFT, follow the plan; a later plan replaces it."""
    assert len(plan.layers) == arch.layers, f"a plan for {len(plan.layers)} layers, a model of {arch.layers}"
    base = _base(model)
    with warnings.catch_warnings():
        # transformers 5.18 and later know it under a second name, 5.17 only under this one.
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable({"use_reentrant": False})
    # It also made the embeddings' output require a gradient, which only reentrant checkpointing needs.
    base.disable_input_require_grads()
    for index, layer in enumerate(plan.layers):
        base.get_submodule(layer_path(index)).gradient_checkpointing = not layer.keep_attention  # type: ignore
        base.get_submodule(experts_path(index)).keep_gate_up = layer.keep_gate_up  # type: ignore[assignment]
        router = base.get_submodule(router_path(index))
        if router not in _KEPT_ROUTING:
            _KEPT_ROUTING[router] = _KeptRouting(router)


def remove_plan(model: nn.Module, arch: MoeArch) -> None:
    """Undoes `apply_plan`: every layer keeps everything, and nothing stands between a checkpoint and the routers."""
    base = _base(model)
    apply_plan(base, arch, ActivationPlan.none(arch.layers))
    for index in range(arch.layers):
        _KEPT_ROUTING.pop(base.get_submodule(router_path(index))).remove()


def _base(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel), type(base)
    return base


class _KeptRouting:
    """Hooks around a router's forward pass: what it saves for backward, except its input, is saved as it is, whatever
    checkpoint or offloading surrounds it."""

    def __init__(self, router: nn.Module):
        self._entered: list[AbstractContextManager[None] | saved_tensors_hooks] = []
        self._handles = [
            router.register_forward_pre_hook(self._enter, prepend=True),
            router.register_forward_hook(self._exit, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # A recomputation that has all it needs ends by an exception, which may come from what the input is saved with.
        self._entered.append(contextlib.nullcontext())
        changed, pointer = None, 0
        source: Any = None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in router.parameters()):
            x = args[0]
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # as the product would, which then saves x itself
            x, source = remember(x)
            changed, pointer = (x, *args[1:]), x.data_ptr()

        def pack(tensor: Tensor) -> Tensor | torch.Size:
            if source is not None and tensor.data_ptr() == pointer:
                return tensor.shape
            # Detached: a saved tensor that is also the output of its node would keep the node, and itself, alive.
            return tensor.detach()

        def unpack(packed: Tensor | torch.Size) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            return source.saved_tensors[0].view(packed)

        hooks = saved_tensors_hooks(pack, unpack)
        hooks.__enter__()
        self._entered[-1] = hooks
        return changed

    def _exit(self, _router: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._entered.pop().__exit__(None, None, None)


_KEPT_ROUTING: WeakKeyDictionary[nn.Module, _KeptRouting] = WeakKeyDictionary()
