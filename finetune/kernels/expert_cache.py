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
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, hot: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    slot, fetch = _empty_assignment(index, owner, used, counts, hot, first, count)
    needed = index.unique().tolist()
    counts[0] += 1
    own = range(first, first + count)
    place = {int(owner[s]): s for s in own}
    missing = [expert for expert in needed if expert not in place]
    free = [s for s in own if int(owner[s]) not in needed and int(used[s]) < PINNED]
    free.sort(key=lambda s: (int(used[s]), s))
    slot.fill_(-1)
    fetch.fill_(-1)
    for rank, expert in enumerate(missing):
        if rank < len(free):
            owner[free[rank]] = expert
            slot[expert] = free[rank]
        else:
            overflow = (first - 1 - (rank - len(free))) % owner.numel()
            owner[overflow], used[overflow] = -1, 0
            slot[expert] = overflow
        fetch[expert] = slot[expert]
    for s in own:
        expert = int(owner[s])
        if expert in needed:
            slot[expert] = s
            used[s] = PINNED if hot[expert] else counts[0]
    counts[1] += len(needed) - len(missing)
    counts[2] += len(missing)
    return slot, fetch


def _empty_assignment(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, hot: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    return hot.new_empty(hot.numel(), dtype=torch.int64), torch.empty_like(hot)


def _assign_cuda(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, hot: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    slot, fetch = _empty_assignment(index, owner, used, counts, hot, first, count)
    triton_expert_cache.assign_slots(index, owner, used, counts, hot, slot, fetch, first, count)
    return slot, fetch


_assign = define(
    "assign_slots(Tensor index, Tensor(a!) owner, Tensor(b!) used, Tensor(c!) counts, Tensor hot, int first, int count)"
    " -> (Tensor, Tensor)",
    plain=_assign_plain,
    cuda=_assign_cuda if HAS_TRITON else None,
    fake=_empty_assignment,
)


def assign_slots(
    index_TK: Tensor, owner_S: Tensor, used_S: Tensor, counts: Tensor, hot_E: Tensor, *, first: int, count: int
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
    return _assign(index_TK.contiguous(), owner_S, used_S, counts, hot_E, first, count)


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
