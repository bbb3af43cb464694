"""The kernels of the expert cache against plain torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from finetune.kernels import expert_cache, triton_expert_cache
from finetune.kernels.expert_cache import PINNED

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize(
    ("experts", "slots", "pinned", "choices"), [(8, 5, 0, 2), (8, 5, 2, 6), (8, 3, 0, 16), (20, 7, 3, 40), (8, 8, 0, 4)]
)
def test_slots_are_plain_torchs(experts: int, slots: int, pinned: int, choices: int) -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.full((slots,), -1, dtype=torch.int32)
    used = torch.zeros(slots, dtype=torch.int64)
    if pinned:
        owner[:pinned], used[:pinned] = torch.arange(pinned).int(), PINNED
    counts = torch.zeros(3, dtype=torch.int64)
    state = [tensor.to(DEVICE, copy=True) for tensor in (owner, used, counts)]
    for _ in range(30):
        index = torch.randint(experts, (choices // 2, 2), generator=generator)
        expected = expert_cache._assign_plain(index, owner, used, counts, experts, 100, 500)
        found = expert_cache._empty_assignment(index, state[0], *state[1:], experts, 100, 500)
        triton_expert_cache.assign_slots(index.to(DEVICE), *state, *found, 100, 500)
        for ours, plain in zip((*found, *state), (*expected, owner, used, counts), strict=True):
            assert torch.equal(ours.cpu(), plain)


def test_fetched_bytes_are_the_hosts() -> None:
    experts, slots = 5, 7
    shapes = [((33, 8), torch.uint8), ((4100,), torch.uint8), ((3,), torch.float32), ((), torch.float32)]
    hosts = [(torch.rand(experts, *shape) * 255).to(dtype) for shape, dtype in shapes]
    pools = [torch.zeros(slots, *shape, dtype=dtype, device=DEVICE) for shape, dtype in shapes]
    if DEVICE.type == "cuda":
        hosts = [host.pin_memory() for host in hosts]
    fetch = torch.tensor([-1, 6, -1, 0, 3], dtype=torch.int32)
    triton_expert_cache.fetch_experts(fetch.to(DEVICE), hosts, pools)
    for host, pool in zip(hosts, pools, strict=True):
        expected = torch.zeros_like(pool, device="cpu")
        for expert, slot in enumerate(fetch.tolist()):
            if slot >= 0:
                expected[slot] = host[expert]
        assert torch.equal(pool.cpu(), expected)
