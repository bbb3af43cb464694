"""Experts that stay in host memory and are fetched to the device when a router chooses them.

The device keeps S slots, each as large as one expert: some for every layer, in which its experts stay by last use
(LRU) or for good (the hot ones, where routing statistics name them). A prompt that needs more experts of a layer than
it has slots uses overflow slots: those of the layers before it. A layer's call determines on the device which experts
are missing and fetches them (`kernels/expert_cache.py`); then the same kernels run on the slots as on resident experts,
by slot number, so the answers are equal bit for bit.

No prefetch: while a step waits for the link, the link is what everything waits for. On an H100 a layer leaves it idle
for 0.13 ms and an expert takes 1.9 ms, so a guess of the next layer's experts gains 0.13 ms when it is right and loses
up to 1.7 ms when it is wrong: it pays from 93% of right guesses on. Nor does the CPU compute what is missing:
bitsandbytes' NF4 product reads 0.2 GB/s of weights on 16 cores of that machine (`finetune bench decode` measures it
beside the link).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import DeviceError
from finetune.kernels import PackedExperts, assign_slots, fetch_experts
from finetune.moe import EXPERT_PROJECTIONS, FEW_CHOICES, MoeArch, QuantizedExperts, experts_path, run_experts

# Prompts go through the experts in pieces of so many tokens: their rows then take 0.4 GB of Mixtral's, not 1.6.
PIECE_TOKENS = 1024


@dataclass(frozen=True)
class SlotPlan:
    """How many slots each layer gets.

    Attributes:
        counts: of each layer; at least one.
        hot: per layer, experts that keep a slot for good; fewer than its slots.
    """

    counts: tuple[int, ...]
    hot: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(self.counts)


def least_slots(arch: MoeArch) -> int:
    """The fewest slots: one per layer, and all experts of one layer, which a prompt may need at once."""
    return max(arch.layers, arch.experts)


def plan_slots(arch: MoeArch, slots: int, load_LE: Sequence[Sequence[float]] | None = None) -> SlotPlan | None:
    """Distributes slots over the layers as evenly as possible; None if they are too few.

    Half of a layer's slots keep its hottest experts where their load is known.

    Args:
        load_LE: any measure of how often each expert is chosen.
    """
    if slots < least_slots(arch):
        return None
    own, more = divmod(min(slots, arch.layers * arch.experts), arch.layers)
    counts = tuple(own + (layer < more) for layer in range(arch.layers))
    hot: list[tuple[int, ...]] = [() for _ in counts]
    if load_LE is not None:
        for layer, load in enumerate(load_LE):
            ranked = sorted(range(arch.experts), key=lambda expert, load=load: -load[expert])  # type: ignore[misc]
            hot[layer] = tuple(ranked[: counts[layer] // 2])
    return SlotPlan(counts, tuple(hot))


class OffloadedExperts(nn.Module):
    """Takes the place of an experts module; for inference only.

    Args:
        experts: the module with all its weights in host memory.
        slots: both projections' packed weights [S, ...] on the device, which all layers share.
        owner_S, used_S: what lies in all slots and since when (`kernels/expert_cache.py`), which all layers share.
        first, count: the layer's own slots among them.
        hot: experts that keep a slot for good.
    """

    def __init__(
        self,
        experts: QuantizedExperts,
        slots: Sequence[PackedExperts],
        owner_S: Tensor,
        used_S: Tensor,
        *,
        first: int,
        count: int,
        hot: Sequence[int],
        counts: Tensor,
    ):
        super().__init__()
        device = slots[0].packed.device
        self.num_experts, self.first, self.count, self.counts = experts.num_experts, first, count, counts
        self.gate_up, self.down = slots
        for projection in EXPERT_PROJECTIONS:
            weights = experts.packed(projection)
            experts.set_packed(projection, type(weights)(*[_device_readable(t.detach(), device) for t in weights]))
        # In a list, not as a submodule: `model.to` must not take the host's weights along.
        self._experts = [experts]
        self._hosts = [tensor.detach() for projection in EXPERT_PROJECTIONS for tensor in experts.packed(projection)]
        self._slots = [tensor for weights in slots for tensor in weights]
        self._owner_S, self._used_S = owner_S, used_S
        self._hot_E = torch.zeros(self.num_experts, dtype=torch.int32)
        self._hot_E[list(hot)] = 1
        self._hot_E = self._hot_E.to(device)
        # Filled from the start, so that the first tokens find something: the hot ones, then the others in turn.
        first_ones = [*hot, *(expert for expert in range(self.num_experts) if expert not in hot)][:count]
        self.fetch(torch.tensor([first_ones], device=device))

    def fetch(self, index_TK: Tensor) -> Tensor:
        """Fetches the chosen experts; returns their slots, int64 [T, K], valid until the next call of any layer."""
        slot_E, fetch_E = assign_slots(
            index_TK, self._owner_S, self._used_S, self.counts, self._hot_E, first=self.first, count=self.count
        )
        fetch_experts(fetch_E, self._hosts, self._slots)
        return slot_E[index_TK]

    @property
    def experts(self) -> QuantizedExperts:
        """The module whose place this took, its weights still in host memory."""
        return self._experts[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `QuantizedExperts.forward`."""
        slots = self.fetch(top_k_index)
        if top_k_index.numel() <= FEW_CHOICES:
            return run_experts(hidden_states, slots, top_k_weights, self.gate_up, self.down)
        pieces = [tensor.split(PIECE_TOKENS) for tensor in (hidden_states, slots, top_k_weights)]
        # The loop touches only slots that have rows; grouped would dequantize all of them.
        return torch.cat(
            [
                run_experts(x, slot, weight, self.gate_up, self.down, backend="loop")
                for x, slot, weight in zip(*pieces, strict=True)
            ]
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, slots={self.count}"


def expert_bytes(experts: QuantizedExperts) -> int:
    """Bytes of all tensors of one expert, which is the size of a slot."""
    both = [experts.packed(projection) for projection in EXPERT_PROJECTIONS]
    return sum(weights.nbytes for weights in both) // experts.num_experts


def offload_experts(model: Any, arch: MoeArch, plan: SlotPlan, device: torch.device) -> Tensor:
    """Replaces every experts module of a causal LM, whose experts lie in host memory, in place.

    Returns:
        int64 [L, 3] on the device: steps, and from now on experts found in a slot and experts fetched.

    Raises:
        DeviceError: the host's memory cannot be page-locked.
    """
    some = model.get_submodule(experts_path(0))
    owner_S = torch.full((plan.total,), -1, dtype=torch.int32, device=device)
    used_S = torch.zeros(plan.total, dtype=torch.int64, device=device)
    slots = [_empty_slots(some.packed(projection), plan.total, device) for projection in EXPERT_PROJECTIONS]
    counts_L3 = torch.zeros(arch.layers, 3, dtype=torch.int64, device=device)
    first = 0
    for layer, count in enumerate(plan.counts):
        path = experts_path(layer)
        offloaded = OffloadedExperts(
            model.get_submodule(path),
            slots,
            owner_S,
            used_S,
            first=first,
            count=count,
            hot=plan.hot[layer],
            counts=counts_L3[layer],
        )
        model.set_submodule(path, offloaded)
        first += count
    counts_L3[:, 1:] = 0  # not the steps, which are the clock of last use
    return counts_L3


def undo_offload(model: Any, arch: MoeArch) -> None:
    """Undoes `offload_experts`: puts the original modules back, with their weights in host memory."""
    for layer in range(arch.layers):
        offloaded = model.get_submodule(experts_path(layer))
        assert isinstance(offloaded, OffloadedExperts)
        model.set_submodule(experts_path(layer), offloaded.experts)


def _empty_slots(weights: PackedExperts, slots: int, device: torch.device) -> PackedExperts:
    # Zeros, not whatever was there: a product over an expert without rows may read a slot that was never filled.
    empty = [torch.zeros(slots, *t.shape[1:], dtype=t.dtype, device=device) for t in weights]
    return type(weights)(*empty)


def _device_readable(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in host memory that a kernel can read in place; the tensor itself for a CPU.

    By `pin_memory`, though its allocator rounds up to a power of two, 14% more for Mixtral's experts: the kernel reads
    51 GB/s of it, and 49 of memory that `cudaHostRegister` locks.
    """
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        raise DeviceError(
            f"{tensor.nbytes / 2**20:.0f} MiB of host memory could not be page-locked for the GPU: {error}",
            where="--residency offload",
            allowed="a limit of locked memory above the experts' size (ulimit -l), and 1.15 times as much free memory",
            fix="raise the limit, free memory, or use experts of fewer bits",
        ) from error
