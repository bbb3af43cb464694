"""The module that stands in for a transformers experts module, with its weights quantized.

Same call as transformers >= 5 experts modules: (hidden_states, top_k_index, top_k_weights) -> hidden_states. The
tensors are frozen parameters, not buffers, so that DDP does not broadcast 23 GB of them every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.kernels import (
    BackendChoice,
    ExpertStorage,
    PackedExperts,
    choose_backend,
    empty_experts,
    frozen_experts,
    packed_type,
    quantize_experts,
    remember,
    runs_on_kernels,
    skinny_experts,
    to_fp16_activations,
)
from finetune.moe.arch import EXPERT_PROJECTIONS
from finetune.private_api import mark_initialized

# Up to so many choices (tokens * top_k) without gradients, on a GPU, the matrices are read without being written out:
# transformers' own `generate` decodes that way.
FEW_CHOICES = 64


class QuantizedExperts(nn.Module):
    """E SwiGLU experts: gate_up_proj [E, 2F, H] and down_proj [E, H, F], each as the tensors of an `Nf4Weights`
    or a `LowBitWeights`, named `<projection>_<field>`.

    While a full-precision checkpoint is loading, `<projection>` itself is a meta parameter that tells transformers
    where the fused tensor belongs; `set_packed` removes it.

    Attributes:
        backend: how the products are made; auto is `kernels.choose_backend`'s rule.
        keep_gate_up: False computes the gate_up output again in the backward pass, for less memory.
        quantized_in: the dtype of the weights that `quantize` got; None where they were read packed.
    """

    backend: BackendChoice = "auto"
    keep_gate_up: bool = True
    quantized_in: torch.dtype | None = None

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        *,
        storage: ExpertStorage = "nf4",
        awaits_fused: bool = False,
    ):
        super().__init__()
        self.storage = storage
        # Not asked of the type: a forward pass asks 256 times.
        self._packed_type = packed_type(storage)
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, intermediate
        shapes = dict(zip(EXPERT_PROJECTIONS, ((2 * intermediate, hidden), (hidden, intermediate)), strict=True))
        for projection, (out, in_) in shapes.items():
            if awaits_fused:
                fused = torch.empty(experts, out, in_, device="meta")
                self.register_parameter(projection, nn.Parameter(fused, requires_grad=False))
            else:
                self.set_packed(projection, empty_experts(storage, experts, out, in_, "meta"))

    def set_packed(self, projection: str, weights: PackedExperts) -> None:
        """Takes the weights, in this module's storage, as this projection's weights."""
        assert isinstance(weights, self._packed_type), type(weights)
        self._parameters.pop(projection, None)
        for field, tensor in weights._asdict().items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            mark_initialized(parameter)
            self.register_parameter(f"{projection}_{field}", parameter)

    def quantize(self, projection: str, weight_EOI: Tensor) -> None:
        """Quantizes a fused tensor [E, out, in] and keeps only its quantized form."""
        self.quantized_in = weight_EOI.dtype
        self.set_packed(projection, quantize_experts(self.storage, weight_EOI))

    def packed(self, projection: str) -> PackedExperts:
        # Not `get_parameter`, which walks a path: a forward pass asks 256 times.
        stored: Any = self._parameters
        return self._packed_type(*(stored[f"{projection}_{field}"] for field in self._packed_type._fields))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H] in hidden_states' dtype."""
        gate_up, down = (self.packed(projection) for projection in EXPERT_PROJECTIONS)
        return run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            backend=self.backend,
            keep_gate_up=self.keep_gate_up,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves devices but keeps dtypes: `model.to(torch.bfloat16)` must not round the scales."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        sizes = f"hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"experts={self.num_experts}, {sizes}, {self.storage}"


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    *,
    backend: BackendChoice = "auto",
    keep_gate_up: bool = True,
) -> Tensor:
    """What an experts module computes, with the weights that it is given; arguments as `QuantizedExperts.forward`."""
    x, device = hidden_states, hidden_states.device
    if torch.is_autocast_enabled(device.type):
        x = x.to(torch.get_autocast_dtype(device.type))
    few = top_k_index.numel() <= FEW_CHOICES and backend == "auto" and not torch.is_grad_enabled()
    if few and runs_on_kernels(x):
        parts_PSH = skinny_experts(to_fp16_activations(x), top_k_index, gate_up, down)
        y_TKH = parts_PSH.sum(0).view(*top_k_index.shape, -1)
        return (y_TKH * top_k_weights.float().unsqueeze(-1)).sum(1).to(hidden_states.dtype)
    source = None
    if not keep_gate_up and torch.is_grad_enabled():
        x, source = remember(x)
    rows, experts, weights = top_k_index.numel(), gate_up.packed.shape[0], math.prod(gate_up.matrix_shape)
    chosen = choose_backend(backend, device, x.dtype, rows=rows, experts=experts, weights=weights)
    # The routing and the gate_up output are kept whatever checkpoint surrounds this: a routing that is recomputed
    # can differ in a token, and the gate_up output is `keep_gate_up`'s business.
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        y = frozen_experts(
            x,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            backend=chosen,
            keep_gate_up=keep_gate_up,
            source=source,
        )
    return y.to(hidden_states.dtype)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
