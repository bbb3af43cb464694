"""Experts in the host's memory: the tokens of resident ones, the hits that a count by hand gives, and refusals."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapter.adapter import load
from finetune.errors import DataError, DeviceError
from finetune.infer.engine import Engine
from finetune.infer.loading import chooses_offload
from finetune.infer.offloaded import (
    OffloadedExperts,
    _device_readable,
    expert_bytes,
    offload_experts,
    plan_slots,
    undo_offload,
)
from finetune.infer.pages import PAGE, page_bytes
from finetune.infer.request import FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings, needs_offload, read_load, split_memory
from finetune.kernels.expert_cache import PINNED
from finetune.kernels.packed_experts import ExpertStorage
from finetune.moe.arch import EXPERT_PROJECTIONS, MoeArch, experts_path
from finetune.moe.experts import QuantizedExperts
from finetune.moe.load import read_config

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
CPU = torch.device("cpu")
ARCH = MoeArch.from_config(read_config(str(MODEL)))
KV_GIB = 0.02


def settings_with(
    slots: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32, **more: Any
) -> EngineSettings:
    """A budget that leaves room for so many slots."""
    size = expert_bytes(QuantizedExperts(ARCH.experts, ARCH.hidden, ARCH.intermediate))
    settings = EngineSettings(residency="offload", **more)
    settings = replace(settings, kv_gib=KV_GIB, device_gib=2.0)
    _, for_slots = split_memory(ARCH, dtype, device, settings, settings.longest(10**9), offload=True)
    return replace(settings, device_gib=2.0 - (for_slots - (slots + 0.5) * size) / 2**30)


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """All at once, so that rows join and leave."""
    found: list[list[int]] = [[] for _ in requests]
    ends = [threading.Event() for _ in requests]
    for number, request in enumerate(requests):

        def listen(event: Any, number: int = number) -> None:
            if isinstance(event, TokenEvent):
                found[number].append(event.token)
            elif isinstance(event, FinishedEvent):
                ends[number].set()

        engine.submit(request, listen)
    assert all(end.wait(120) for end in ends)
    return found


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("routing") / "base.json"
    load = [[1.0 + (expert + layer) % ARCH.experts for expert in range(ARCH.experts)] for layer in range(ARCH.layers)]
    file.write_text(json.dumps({"layers": [{"load": row} for row in load]}))
    return file


@pytest.fixture(scope="module")
def resident() -> Iterator[Engine]:
    with Engine.load(str(MODEL), device="cpu", settings=EngineSettings(max_batch=4, max_length=512)) as made:
        yield made


@pytest.mark.parametrize("slots", [max(ARCH.layers, ARCH.experts), ARCH.layers * 5 + 4])
def test_tokens_are_those_of_resident_experts(resident: Engine, routing: Path, slots: int) -> None:
    texts = ["The capital of France is", "Once", "def f(x):", "Hello " * 60, "Why", "x"]
    requests = [
        Request(resident.encode_text(text), Sampling(max_new_tokens=4 + number, ignore_eos=True, logprobs=0))
        for number, text in enumerate(texts)
    ]
    expected = answers(resident, requests)
    settings = settings_with(slots, max_batch=4, max_length=512, routing=routing)
    with Engine.load(str(MODEL), device="cpu", settings=settings) as engine:
        widths, decode = set(), engine._runner.decode
        engine._runner.decode = lambda tokens_T, *rest: (widths.add(len(tokens_T)), decode(tokens_T, *rest))[1]  # type: ignore[assignment, func-returns-value]
        assert answers(engine, requests) == expected
        assert 3 in widths  # a row that pads a batch would have experts fetched
        stats = engine.stats()
        assert stats.expert_hits
        assert stats.expert_misses

        def generated(loaded: Any) -> list[int]:
            assert isinstance(loaded.model.get_submodule(experts_path(0)), OffloadedExperts)
            out = loaded.model.generate(input_ids=torch.tensor([requests[0].ids]), max_new_tokens=4, do_sample=False)
            return out[0, len(requests[0].ids) :].tolist()

        assert engine.run(generated) == expected[0]


def test_an_adapters_tokens_are_those_of_resident_experts(saved_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned" / "adapter"
    shutil.copytree(saved_adapter, folder)
    requests = [Request(tuple(range(3, 20)), Sampling(max_new_tokens=6, ignore_eos=True), name)
                for name in ("tuned", "base")]  # fmt: skip
    with Engine.load(str(folder), device="cpu", settings=EngineSettings(max_batch=2, max_length=128)) as engine:
        expected = answers(engine, requests)
    spare = settings_with(ARCH.layers * 3 + 5, max_batch=2, max_length=128)
    with Engine.load(str(folder), device="cpu", settings=spare) as engine:
        assert answers(engine, requests) == expected


def test_hits_are_those_of_a_cache_counted_by_hand() -> None:
    """Four slots of one layer, one of them pinned, against a list in order of last use."""
    model: Any = load(str(MODEL), device="cpu", experts_on="host").model
    load_LE = [[float(expert == 6) for expert in range(ARCH.experts)] for _ in range(ARCH.layers)]
    plan = plan_slots(ARCH, ARCH.layers * 4, load_LE)
    assert plan is not None
    assert plan.counts == (4,) * ARCH.layers
    assert [row[0] for row in plan.hot] == [6] * ARCH.layers
    stacks = [model.get_submodule(experts_path(1)).packed(name) for name in EXPERT_PROJECTIONS]
    counts = offload_experts(model, ARCH, plan, CPU)
    layer = model.get_submodule(experts_path(1))
    assert isinstance(layer, OffloadedExperts)
    own = slice(layer.first, layer.first + layer.count)
    pinned = [int(e) for e, used in zip(layer._owner_S[own], layer._used_S[own], strict=True) if used == PINNED]
    assert pinned == sorted(plan.hot[1])
    recent = [int(e) for e in layer._owner_S[own] if int(e) not in pinned]
    hits = misses = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        # One expert a step: the order of last use has no ties.
        index = torch.randint(ARCH.experts, (1, 1), generator=generator)
        slots = layer.fetch(index)
        needed = sorted(set(index.flatten().tolist()))
        for expert in needed:
            hits += expert in pinned or expert in recent
        missing = [expert for expert in needed if expert not in pinned + recent]
        misses += len(missing)
        for expert in [expert for expert in recent if expert in needed]:
            recent.remove(expert)
            recent.append(expert)
        for expert in missing:
            recent.pop(0)
            recent.append(expert)
        kept = {int(e) for e in layer._owner_S[own]}
        assert kept == {*pinned, *recent}
        for expert, slot in zip(index.flatten().tolist(), slots.flatten().tolist(), strict=True):
            assert torch.equal(layer.gate_up.packed[slot], stacks[0].packed[expert])
            assert torch.equal(layer.down.absmax[slot], stacks[1].absmax[expert])
    assert counts[1].tolist() == [201, hits, misses]  # it was filled in one
    assert counts[0].tolist() == [1, 0, 0]
    undo_offload(model, ARCH)
    again = model.get_submodule(experts_path(1))
    assert all(
        torch.equal(a, b)
        for name, stack in zip(EXPERT_PROJECTIONS, stacks, strict=True)
        for a, b in zip(again.packed(name), stack, strict=True)
    )


def test_slots_are_dealt_out_evenly_and_all_used() -> None:
    least = max(ARCH.layers, ARCH.experts)
    for slots in range(ARCH.layers * ARCH.experts + 3):
        plan = plan_slots(ARCH, slots)
        if slots < least:
            assert plan is None
            continue
        assert plan is not None
        assert len(plan.counts) == ARCH.layers
        assert max(plan.counts) - min(plan.counts) <= 1
        assert plan.total == min(slots, ARCH.layers * ARCH.experts)


def test_too_little_room_is_refused_with_what_is_needed() -> None:
    least = max(ARCH.layers, ARCH.experts)
    settings = settings_with(least - 1, max_batch=1, max_length=128)
    with pytest.raises(DeviceError, match="the device has room for") as caught:
        Engine.load(str(MODEL), device="cpu", settings=settings)
    message = str(caught.value)
    assert "where: --device-gib" in message
    assert f"{least} or more" in message
    assert "shorter --max-length" in message


def test_what_keys_and_values_take_no_expert_gets() -> None:
    def split(kv_gib: float) -> tuple[int, int]:
        settings = EngineSettings(max_batch=64, kv_gib=kv_gib, device_gib=8.0)
        return split_memory(ARCH, torch.float32, CPU, settings, 2048, offload=True)

    (kv, slots), (more_kv, fewer) = split(0.01), split(0.05)
    assert (kv, more_kv) == (int(0.01 * 2**30), int(0.05 * 2**30))
    assert slots - fewer == more_kv - kv
    all_rows = (64 * 2048 // PAGE + 1) * page_bytes(ARCH, torch.float32)
    assert split(100.0)[0] == all_rows


def test_memory_that_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    with pytest.raises(DeviceError, match="3 MiB of host memory could not be page-locked") as caught:
        _device_readable(torch.zeros(3, 2**20, dtype=torch.uint8), torch.device("cuda"))
    message = str(caught.value)
    assert "out of memory" in message
    assert "ulimit -l" in message
    assert "experts of fewer bits" in message


def test_a_residency_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DeviceError, match="there is no residency 'disk'") as caught:
        EngineSettings(residency="disk")  # type: ignore[arg-type]
    assert "auto, resident, offload" in str(caught.value)


def test_routing_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    for content in ('{"layers": [{"load": [0.5, 0.5]}]}', "{}", "not json", '{"layers": 3}'):
        file.write_text(content)
        with pytest.raises(DataError, match="no load of this model's experts") as caught:
            read_load(file, ARCH)
        assert f"{ARCH.layers} layers of {ARCH.experts} experts" in str(caught.value)
        assert "router/base.json" in str(caught.value)
    with pytest.raises(DataError, match="there is no such file"):
        read_load(tmp_path / "none.json", ARCH)


def test_auto_is_resident_where_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not chooses_offload(str(MODEL), None, "cpu", EngineSettings())
    shape = Path(__file__).parents[2] / "recipes" / "mixtral-8x7b" / "shape"
    mixtral = MoeArch.from_config(read_config(str(shape)))
    cuda = torch.device("cuda", 0)

    def offloads(gib: float, storage: ExpertStorage = "nf4") -> bool:
        monkeypatch.setattr("finetune.infer.residency.free_bytes", lambda device, budget: int(gib * 2**30))
        return needs_offload(
            mixtral,
            torch.bfloat16,
            cuda,
            EngineSettings(max_batch=16),
            4096,
            experts=storage,
            attention_bits=4.127,
        )

    weights = 0.5159 * mixtral.expert_params + 2 * mixtral.embedding_params
    assert offloads(weights / 2**30)
    assert not offloads(80)
    assert not offloads(32)
    assert offloads(20)
    assert not offloads(20, "hqq2")
    assert page_bytes(mixtral, torch.bfloat16) == 64 * 32 * 2 * 8 * 128 * 2
