"""Experts that live in the host's memory, and the few slots of the device's that they take turns in.

A decoding step on a card that cannot hold all experts must not ask the host which are missing: at 32 layers a token, a
synchronization each would cost as much as the arithmetic, and no step could be one CUDA graph. So both halves run on
the device:

    assign_slots    which slot each needed expert has or gets, and which of them must be fetched: least recently used
                    first, per layer, never a slot whose expert is needed now; pinned slots stay.
    fetch_experts   copies the missing experts from page-locked host memory, which the kernel reads in place.

Measured on one H100 (PCIe 5 x16), an expert of Mixtral 8x7B in NF4 (90.9 MB): 51 GB/s by the kernel from 8 programs
on (49 from memory that was locked after it had been allocated), where the copy engine reaches 54.7. Bulk copies
through shared memory (cp.async.bulk) gave 37.

Nothing is written back: experts never change. A needed expert that finds every slot of its layer needed, as in a long
prompt, goes to an overflow slot: one of the slots before the layer's own, which belong to the layers that ran last and
are theirs again afterwards. Slots kept for overflow alone would be empty while answers are written: 4 of the 157 that
16 GiB leave.

Shape suffixes: T rows, K choices, E experts, S slots of all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, operator

if HAS_TRITON:
    from finetune.kernels import triton_kernels

PINNED = 2**62
"""The last use of a slot that keeps its expert."""


def _empty_assignment(
    index_TK: Tensor, owner_S: Tensor, used_S: Tensor, counts: Tensor, hot_E: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    return hot_E.new_empty(hot_E.numel(), dtype=torch.int64), torch.empty_like(hot_E)


@operator(
    launch=HAS_TRITON and triton_kernels.assign_slots, empty=_empty_assignment, writes=["owner_S", "used_S", "counts"]
)
def assign_slots(
    index_TK: Tensor, owner_S: Tensor, used_S: Tensor, counts: Tensor, hot_E: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """int64 [E], the slot in which each needed expert will lie (-1 for the others), and int32 [E], the same for those
    that must be fetched into it first. The state of the slots is brought up to date.

    Args:
        index_TK: int64, the experts that are needed, each any number of times.
        owner_S: int32, the expert of its layer in each slot of all layers, -1 for none; at least E slots.
        used_S: int64, the step of its last use; `PINNED` for a hot expert's.
        counts: int64 [3]: the layer's steps, needed experts that were there, and those that were not.
        hot_E: int32, 1 for the experts that keep their slot for good once they have one, unless it is an overflow slot;
            fewer than `count`.
        first, count: the layer's own slots, of which there are at least one.
    """
    slot, fetch = _empty_assignment(index_TK, owner_S, used_S, counts, hot_E, first, count)
    needed = index_TK.unique().tolist()
    counts[0] += 1
    own = range(first, first + count)
    held = {int(owner_S[s]) for s in own}
    missing = [expert for expert in needed if expert not in held]
    free = [s for s in own if int(owner_S[s]) not in needed and int(used_S[s]) < PINNED]
    free.sort(key=lambda s: (int(used_S[s]), s))
    slot.fill_(-1)
    fetch.fill_(-1)
    for rank, expert in enumerate(missing):
        if rank < len(free):
            owner_S[free[rank]] = expert
            slot[expert] = free[rank]
        else:
            overflow = (first - 1 - (rank - len(free))) % owner_S.numel()
            owner_S[overflow], used_S[overflow] = -1, 0
            slot[expert] = overflow
        fetch[expert] = slot[expert]
    for s in own:
        expert = int(owner_S[s])
        if expert in needed:
            slot[expert] = s
            used_S[s] = PINNED if hot_E[expert] else counts[0]
    counts[1] += len(needed) - len(missing)
    counts[2] += len(missing)
    return slot, fetch


@operator(launch=HAS_TRITON and triton_kernels.fetch_experts, writes=["slots"])
def fetch_experts(fetch_E: Tensor, hosts: list[Tensor], slots: list[Tensor]) -> None:
    """Copies expert e of every host tensor [E, ...] to slot fetch_E[e] of its partner [S, ...], where that is not -1.

    Args:
        hosts: page-locked, where the slots are on a GPU.
    """
    for expert, slot in enumerate(fetch_E.tolist()):
        if slot >= 0:
            for host, target in zip(hosts, slots, strict=True):
                target[slot] = host[expert]
