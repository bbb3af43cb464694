"""Experts in host memory, on a GPU: the kernels' cases, and the tokens of resident experts."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.adapter.adapter import load
from finetune.bench.offload import bench_offload
from finetune.export.quantized import write_quantized
from finetune.infer.engine import Engine
from finetune.infer.loading import ServedModels
from finetune.infer.offloaded import undo_offload
from finetune.infer.request import Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from tests.infer.test_residency import ARCH, settings_with
from tests.kernels.interpreted.expert_cache_cases import *  # noqa: F403

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"


def tokens(engine: Engine) -> list[list[int]]:
    # Short enough that a prompt's experts run on the same kernels: the products of long ones differ by roundings.
    prompts = [tuple(range(start, start + 20)) for start in (3, 400, 5000, 31000)]
    return [
        [event.token for event in engine.stream(Request(ids, Sampling(max_new_tokens=40, ignore_eos=True)))
         if isinstance(event, TokenEvent)]
        for ids in prompts
    ]  # fmt: skip


def test_tokens_are_those_of_resident_experts(tmp_path: Path) -> None:
    # Saved first: the CPU, which quantizes for the host's memory, takes its means in another order than the GPU.
    write_quantized(str(MODEL), tmp_path / "nf4", device="cuda")
    model = str(tmp_path / "nf4")
    with Engine.load(model, device="cuda", settings=EngineSettings(4, 256)) as engine:
        expected = tokens(engine)
    loaded = load(model, device="cuda", experts_on="host")
    for slots in (ARCH.layers + 7, 4 * ARCH.layers + 4, 8 * ARCH.layers):
        settings = settings_with(slots, loaded.device, torch.bfloat16, max_batch=4, max_length=256)
        with Engine(ServedModels(loaded, (), {"model": 0}, experts_on="host"), model, settings) as engine:
            assert tokens(engine) == expected
            stats = engine.stats()
            print(slots, stats.expert_hits, stats.expert_misses, stats.expert_fetched_bytes)
            assert (stats.expert_misses == 0) == (slots == 8 * ARCH.layers)
        undo_offload(loaded.model, loaded.arch)
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_bench_runs_with_and_without_a_trace() -> None:
    loaded = load(str(MODEL), device="cuda", experts_on="host")
    document = bench_offload(loaded, [2.0], batches=[1, 3], contexts=[16], tokens=12)
    assert [row["routing"] for row in document["offload"]] == ["own", "trace"] * 2
    assert document["cpu_product_bytes_per_second"] > 0
