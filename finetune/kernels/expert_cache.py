"""Experts that live in the host's memory, and the few slots of the device's that they take turns in.

A decoding step on a card that cannot hold all experts must not ask the host which are missing: at 32 layers a token, a
synchronization each would cost as much as the arithmetic, and no step could be one CUDA graph. So both halves run on
the device:

    assign_slots    which slot each needed expert has or gets, and which of them must be fetched: least recently used
                    first, per layer, never a slot whose expert is needed now; pinned slots stay.
    fetch_experts   copies the missing experts from page-locked host memory, which the kernel reads in place.

Measured on one H100 (PCIe 5 x16), an expert of Mixtral 8x7B in NF4 (90.9 MB): 49 GB/s by the kernel from 8 programs
on (51 where `pin_memory` allocated it), where the copy engine reaches 54.7. Bulk copies through shared memory
(cp.async.bulk) gave 37.

Nothing is written back: experts never change. A needed expert that finds every slot of its layer needed goes to the
overflow slots, which all layers share and none keeps.

Shape suffixes: T rows, K choices, E experts, C slots of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.kernels.operators import HAS_TRITON, define

if HAS_TRITON:
    from finetune.kernels import triton_expert_cache

PINNED = 2**62
"""The last use of a slot that keeps its expert."""

# ---- which slots --------------------------------------------------------------------------------------------------


def _assign_plain(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, experts: int, first: int, overflow: int
) -> tuple[Tensor, Tensor]:
    slot, fetch = _empty_assignment(index, owner, used, counts, experts, first, overflow)
    needed = index.unique().tolist()
    counts[0] += 1
    held = owner.tolist()
    missing = [expert for expert in needed if expert not in held]
    free = [c for c in range(len(held)) if held[c] not in needed and int(used[c]) < PINNED]
    free.sort(key=lambda c: (int(used[c]), c))
    slot.fill_(-1)
    fetch.fill_(-1)
    for rank, expert in enumerate(missing):
        if rank < len(free):
            owner[free[rank]] = expert
            slot[expert] = first + free[rank]
        else:
            slot[expert] = overflow + rank - len(free)
        fetch[expert] = slot[expert]
    for c, expert in enumerate(owner.tolist()):
        if expert in needed:
            slot[expert] = first + c
            used[c] = torch.where(used[c] < PINNED, counts[0], used[c])
    counts[1] += len(needed) - len(missing)
    counts[2] += len(missing)
    return slot, fetch


def _empty_assignment(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, experts: int, first: int, overflow: int
) -> tuple[Tensor, Tensor]:
    return owner.new_empty(experts, dtype=torch.int64), owner.new_empty(experts)


def _assign_cuda(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, experts: int, first: int, overflow: int
) -> tuple[Tensor, Tensor]:
    slot, fetch = _empty_assignment(index, owner, used, counts, experts, first, overflow)
    triton_expert_cache.assign_slots(index, owner, used, counts, slot, fetch, first, overflow)
    return slot, fetch


_assign = define(
    "assign_slots(Tensor index, Tensor(a!) owner, Tensor(b!) used, Tensor(c!) counts, int experts, int first, "
    "int overflow) -> (Tensor, Tensor)",
    plain=_assign_plain,
    cuda=_assign_cuda if HAS_TRITON else None,
    fake=_empty_assignment,
)


def assign_slots(
    index_TK: Tensor, owner_C: Tensor, used_C: Tensor, counts: Tensor, *, experts: int, first: int, overflow: int
) -> tuple[Tensor, Tensor]:
    """int64 [E], the slot in which each needed expert will lie (-1 for the others), and int32 [E], the same for those
    that must be fetched into it first. The layer's state is brought up to date.

    Args:
        index_TK: int64, the experts that are needed, each any number of times.
        owner_C: int32, the expert in each slot of the layer, -1 for none.
        used_C: int64, the step of its last use; `PINNED` keeps it for good.
        counts: int64 [3]: steps, needed experts that were there, and those that were not.
        first: number of the layer's first slot among all.
        overflow: number of the first overflow slot; there are at least E less the slots of any layer.
    """
    return _assign(index_TK.contiguous(), owner_C, used_C, counts, experts, first, overflow)


# ---- fetching -----------------------------------------------------------------------------------------------------


def _fetch_plain(fetch: Tensor, hosts: list[Tensor], slots: list[Tensor]) -> None:
    for expert, slot in enumerate(fetch.tolist()):
        if slot >= 0:
            for host, target in zip(hosts, slots, strict=True):
                target[slot] = host[expert]


def _fetch_cuda(fetch: Tensor, hosts: list[Tensor], slots: list[Tensor]) -> None:
    triton_expert_cache.fetch_experts(fetch, hosts, slots)


_fetch = define(
    "fetch_experts(Tensor fetch, Tensor[] hosts, Tensor(a!)[] slots) -> ()",
    plain=_fetch_plain,
    cuda=_fetch_cuda if HAS_TRITON else None,
    fake=lambda fetch, hosts, slots: None,
)


def fetch_experts(fetch_E: Tensor, hosts: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
    """Copies expert e of every host tensor [E, ...] to slot fetch_E[e] of its partner [S, ...], where that is not -1.

    Args:
        hosts: page-locked, where the slots are on a GPU.
    """
    _fetch(fetch_E, list(hosts), list(slots))
