"""Raw Triton kernels of the expert cache; called only through the operators of `expert_cache.py`."""

# mypy: disable-error-code="no-untyped-def"
# Kernels take pointers and numbers that only triton's compiler types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton_launch import launch

PINNED: tl.constexpr = tl.constexpr(2**62)
# Enough to keep the link full (8 of them already are), few enough to leave the GPU to others.
FETCH_PROGRAMS = 32


@triton.jit
def assign_kernel(
    index_ptr, owner_ptr, used_ptr, counts_ptr, hot_ptr, slot_ptr, fetch_ptr, CHOICES, FIRST, TOTAL,
    E: tl.constexpr, C: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one layer. Experts are rows and its own slots columns of the comparisons."""
    e = tl.arange(0, EXPERTS)
    c = tl.arange(0, SLOTS)
    needed = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, CHOICES, BLOCK):
        choice = start + tl.arange(0, BLOCK)
        chosen = tl.load(index_ptr + choice, mask=choice < CHOICES, other=-1).to(tl.int32)
        needed = tl.maximum(needed, tl.max((chosen[None, :] == e[:, None]).to(tl.int32), 1))
    owner = tl.load(owner_ptr + FIRST + c, mask=c < C, other=-1)
    used = tl.load(used_ptr + FIRST + c, mask=c < C, other=PINNED)
    hot = tl.load(hot_ptr + e, mask=e < E, other=0)
    step = tl.load(counts_ptr) + 1
    holds = (owner[None, :] == e[:, None]).to(tl.int32)
    place = tl.max(tl.where(holds > 0, c[None, :], -1), 1)
    missing = tl.where(place < 0, needed, 0)
    wanted = tl.max(holds * needed[:, None], 0)
    free = tl.where((wanted == 0) & (used < PINNED), 1, 0)
    # How many free slots were used before each, ties by number: the order in which they are given away.
    earlier = (used[:, None] < used[None, :]) | ((used[:, None] == used[None, :]) & (c[:, None] < c[None, :]))
    order = tl.sum(tl.where(earlier, free[:, None], 0), 0)
    rank = tl.cumsum(missing, 0) - 1
    gives = tl.where((rank[:, None] == order[None, :]), missing[:, None] * free[None, :], 0)
    given = tl.max(tl.where(gives > 0, c[None, :], -1), 1)
    overflow = (FIRST - 1 - (rank - tl.sum(free)) + TOTAL) % TOTAL
    overflows = (missing > 0) & (given < 0)
    slot = tl.where(place >= 0, FIRST + place, tl.where(overflows, overflow, FIRST + given))
    tl.store(slot_ptr + e, tl.where(needed > 0, slot, -1).to(tl.int64), mask=e < E)
    tl.store(fetch_ptr + e, tl.where(missing > 0, slot, -1), mask=e < E)
    taken = tl.max(gives, 0)
    held = tl.maximum(holds * needed[:, None], gives)
    last = tl.where(tl.max(held * hot[:, None], 0) > 0, PINNED, step)
    tl.store(owner_ptr + FIRST + c, tl.where(taken > 0, tl.sum(gives * e[:, None], 0), owner), mask=c < C)
    tl.store(used_ptr + FIRST + c, tl.where((taken > 0) | (wanted > 0), last, used), mask=c < C)
    tl.store(owner_ptr + overflow, tl.full([EXPERTS], -1, tl.int32), mask=overflows)
    tl.store(used_ptr + overflow, tl.zeros([EXPERTS], tl.int64), mask=overflows)
    misses = tl.sum(missing)
    tl.store(counts_ptr, step)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + tl.sum(needed) - misses)
    tl.store(counts_ptr + 2, tl.load(counts_ptr + 2) + misses)


def assign_slots(
    index: Tensor, owner: Tensor, used: Tensor, counts: Tensor, hot: Tensor, slot: Tensor, fetch: Tensor, first: int,
    count: int,
) -> None:  # fmt: skip
    """As the operator; `slot` and `fetch` are the outputs."""
    experts = hot.numel()
    launch(
        assign_kernel, (1,), index, owner, used, counts, hot, slot, fetch, index.numel(), first, owner.numel(),
        E=experts, C=count, EXPERTS=triton.next_power_of_2(experts), SLOTS=triton.next_power_of_2(count),
        BLOCK=min(256, triton.next_power_of_2(index.numel())),
    )  # fmt: skip


@triton.jit
def copy_share(source_ptr, target_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of WORDS words."""
    for start in range(tl.program_id(0) * BLOCK, WORDS, tl.num_programs(0) * BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + word, tl.load(source_ptr + word, mask=word < WORDS), mask=word < WORDS)


@triton.jit
def fetch_kernel(fetch_ptr, hosts, slots, E: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Every program copies its share of every missing expert's tensors."""
    for expert in range(E):
        slot = tl.load(fetch_ptr + expert).to(tl.int64)
        if slot >= 0:
            for number in tl.static_range(len(WORDS)):
                copy_share(
                    hosts[number] + expert * WORDS[number], slots[number] + slot * WORDS[number], WORDS[number], BLOCK
                )


def fetch_experts(fetch: Tensor, hosts: list[Tensor], slots: list[Tensor]) -> None:
    """As the operator."""
    sources, targets = [_words(host) for host in hosts], [_words(slot) for slot in slots]
    # The kernel counts the host's words in 32 bits.
    assert all(source.numel() < 2**31 for source in sources)
    launch(
        fetch_kernel, (FETCH_PROGRAMS,), fetch, tuple(sources), tuple(targets),
        E=fetch.numel(), WORDS=tuple(source.shape[1] for source in sources), BLOCK=2048, num_warps=8,
    )  # fmt: skip


def _words(tensor: Tensor) -> Tensor:
    """[E, words] in the widest integers that an expert's bytes are whole numbers of."""
    rows = tensor.view(tensor.shape[0], -1).view(torch.uint8)
    size = rows.shape[1]
    return rows.view(torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8)
