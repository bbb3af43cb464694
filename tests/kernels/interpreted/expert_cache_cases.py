"""The kernels of the expert cache against plain torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from finetune.kernels import expert_cache, triton_kernels
from finetune.kernels.expert_cache import PINNED

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize(
    ("experts", "slots", "hot", "choices"), [(8, 5, 0, 2), (8, 5, 2, 6), (8, 3, 0, 16), (20, 7, 3, 40), (8, 8, 0, 4)]
)
def test_slots_are_plain_torchs(experts: int, slots: int, hot: int, choices: int) -> None:
    """Three layers in turn, so that overflow slots hold experts, pinned ones among them.

    24 steps, which the interpreter takes seconds for: nine that evict, six with overflow where both happen.
    """
    generator = torch.Generator().manual_seed(0)
    total = max(3 * slots, experts)
    owner = torch.full((total,), -1, dtype=torch.int32)
    used = torch.zeros(total, dtype=torch.int64)
    hot_E = (torch.arange(experts) < hot).int()
    counts = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    shared = [tensor.to(DEVICE, copy=True) for tensor in (owner, used)]
    on_device = [tensor.to(DEVICE, copy=True) for tensor in counts]
    for step in range(24 if DEVICE.type == "cpu" else 60):
        layer, first = step % 3, step % 3 * slots
        index = torch.randint(experts, (choices // 2, 2), generator=generator)
        expected = expert_cache.assign_slots.plain(index, owner, used, counts[layer], hot_E, first, slots)
        state = [*shared, on_device[layer], hot_E.to(DEVICE)]
        found = expert_cache.assign_slots.empty(index, *state, first, slots)
        triton_kernels.assign_slots(index.to(DEVICE), *state, first, slots, *found)
        for ours, plain in zip((*found, *state[:3]), (*expected, owner, used, counts[layer]), strict=True):
            assert torch.equal(ours.cpu(), plain)


def test_overflow_slots_lie_apart_and_leave_nothing_behind() -> None:
    """All experts at once: each in a slot of its own, and the slots before the layer's own hold nobody's expert."""
    owner = torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32)
    used = torch.tensor([5, PINNED, 7, 8, 9, 9])
    counts, hot_E = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    slot, fetch = expert_cache.assign_slots(torch.arange(5)[None], owner, used, counts, hot_E, first=2, count=2)
    assert slot.tolist() == [1, 0, 2, 3, 5]
    assert fetch.tolist() == [1, 0, -1, -1, 5]
    assert owner.tolist() == [-1, -1, 2, 3, 0, -1]
    assert used.tolist() == [0, 0, 1, 1, 9, 0]
    assert counts.tolist() == [1, 2, 3]


def test_fetched_bytes_are_the_hosts() -> None:
    experts, slots = 5, 7
    shapes = [((33, 8), torch.uint8), ((4100,), torch.uint8), ((3,), torch.float32), ((), torch.float32)]
    hosts = [(torch.rand(experts, *shape) * 255).to(dtype) for shape, dtype in shapes]
    pools = [torch.zeros(slots, *shape, dtype=dtype, device=DEVICE) for shape, dtype in shapes]
    if DEVICE.type == "cuda":
        hosts = [host.pin_memory() for host in hosts]
    fetch = torch.tensor([-1, 6, -1, 0, 3], dtype=torch.int32)
    triton_kernels.fetch_experts(fetch.to(DEVICE), hosts, pools)
    for host, pool in zip(hosts, pools, strict=True):
        expected = torch.zeros_like(pool, device="cpu")
        for expert, slot in enumerate(fetch.tolist()):
            if slot >= 0:
                expected[slot] = host[expert]
        assert torch.equal(pool.cpu(), expected)
