"""`finetune bench decode --device-gib`: decoding with the experts in host memory, in so much of the device.

For each budget an engine of its own decodes by the model's own routing and by a trace with the locality of trained
routers: random weights alone would say how a cache does without any. Beside it stand what its two ways of getting at a
missing expert could reach: the link, read by the kernel that fetches, and the CPU, by bitsandbytes' NF4 product.

The allocator is held to the budget less what CUDA's own context takes, so what would not fit fails here too.

The trace: random weights route every token anew, so with C of E experts in slots a cache finds C / E of them. Trained
routers repeat themselves: table 5 of Mixtral of Experts (arXiv 2401.04088) counts how often a token shares at least one
of its two experts with the token before, at layers 0, 15 and 31 of 8x7B. The trace draws each token so that this share
is met at these layers and lies between them on a line elsewhere; of the pairs with something in common as many are
equal as chance would make (1 of 13). All experts are equally popular: the table says nothing about that.

Shape suffixes: N steps, T rows, L layers, K = 2 choices.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from finetune.bench.requests import steady_step
from finetune.bench.result import rounded
from finetune.console import Report, gib
from finetune.infer import (
    PAGE,
    DecodeStep,
    Engine,
    EngineSettings,
    Layer,
    OffloadedExperts,
    ServedModels,
    page_bytes,
    pages_for,
    undo_offload,
)
from finetune.kernels import BLOCK, Fp16Activations, fetch_experts
from finetune.moe import EXPERT_PROJECTIONS, LoadedModel, experts_path

_TRACE_STEPS = 512
# Shares of "first or second choice" repeated, the mean over the table's eight sources, at these layers of 32.
SHARED = {0: 0.480, 15: 0.637, 31: 0.509}
_EXPERTS, _CHOICES = 8, 2  # of a trace


def bench_offload(
    loaded: LoadedModel, budgets: Sequence[float], *, batches: Sequence[int], contexts: Sequence[int], tokens: int
) -> dict[str, Any]:
    """Rows and rates; `loaded` has its experts on the host, and is left so."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, Any] = {}
    routings = ("own", "trace") if (loaded.arch.experts, loaded.arch.top_k) == (8, 2) else ("own",)
    for budget, context, batch, routing in product(budgets, contexts, batches, routings):
        # Keys and values for just these requests; the slots get the rest.
        length = context + tokens + PAGE
        kv = (batch * pages_for(length) + 1) * page_bytes(loaded.arch, loaded.model.dtype)
        settings = EngineSettings(batch, length, kv / 2**30, "offload", budget)
        with Engine(ServedModels(loaded, (), {"model": 0}, experts_on="host"), "model", settings) as engine:
            if routing == "trace":
                engine.run(partial(_follow_trace, engine, batch))
            rows.append({"device_gib": budget, "routing": routing} | _row(engine, batch, context, tokens))
            rates = rates or engine.run(_rates)
        del engine
        undo_offload(loaded.model, loaded.arch)
        gc.collect()
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()
    if loaded.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, loaded.device)
    return {"offload": rows, **rates}


def _follow_trace(engine: Engine, batch: int, loaded: LoadedModel) -> None:
    runner = engine._runner
    step = TracedStep(runner.causal, loaded.arch, (), runner.rotary)
    step.follow(make_trace(_TRACE_STEPS, batch, loaded.arch.layers, seed=0).to(loaded.device))
    runner.decode = step


def _row(engine: Engine, batch: int, context: int, tokens: int) -> dict[str, Any]:
    device = engine.loaded.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steady_step(engine, batch, min(context, 16), 8, seed=1)  # captures the graph, and fills the slots
    steady = steady_step(engine, batch, context, tokens, seed=2)
    hits, misses, moved = (
        getattr(steady.after, name) - getattr(steady.before, name)
        for name in ("expert_hits", "expert_misses", "expert_fetched_bytes")
    )
    slots = engine.loaded.model.get_submodule(experts_path(0))
    assert isinstance(slots, OffloadedExperts)
    used = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    return {
        "batch": batch,
        "context": context,
        "slots": slots.gate_up.packed.shape[0],
        "step_seconds": rounded(steady.seconds),
        "tokens_per_second": rounded(batch / steady.seconds),
        "hit_rate": rounded(hits / max(1, hits + misses)),
        "moved_bytes_per_step": rounded(moved / (tokens - 2)),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if used else None,
        "device_used_bytes": used[1] - used[0] if used else None,
    }


def _rates(loaded: LoadedModel) -> dict[str, Any]:
    """Bytes of experts a second: fetched by the kernel, and multiplied by bitsandbytes on the CPU."""
    layer: Any = loaded.model.get_submodule(experts_path(0))
    assert isinstance(layer, OffloadedExperts)
    link = None
    if loaded.device.type == "cuda":
        # The engine ends after this: what its slots held is no longer needed.
        fetch = torch.arange(loaded.arch.experts, dtype=torch.int32, device=loaded.device)
        size = sum(tensor.nbytes for tensor in layer._hosts)
        link = size / _seconds(lambda: fetch_experts(fetch, layer._hosts, layer._slots), loaded.device)
    stack = layer.experts.packed(EXPERT_PROJECTIONS[0])
    out, in_ = stack.matrix_shape
    weight = torch.randn(out, in_)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    x = torch.randn(1, in_)
    seconds = _seconds(lambda: bnb.gemv_4bit(x, packed, state=state), torch.device("cpu"))
    return {
        "link_bytes_per_second": rounded(link),
        "cpu_product_bytes_per_second": rounded(packed.nbytes / seconds),
        "cpu_threads": torch.get_num_threads(),
    }


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The fastest of four."""
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def print_offload(document: dict[str, Any], report: Report) -> None:
    report.table(
        f"Decoding with experts ({document['experts']}) in host memory, {document['device']}",
        ("device", "routing", "batch", "context", "slots", "tokens/s", "hits", "GB/step", "used"),
        [
            (
                f"{row['device_gib']:g} GiB",
                row["routing"],
                str(row["batch"]),
                str(row["context"]),
                str(row["slots"]),
                f"{row['tokens_per_second']:,.1f}",
                f"{row['hit_rate']:.1%}",
                f"{row['moved_bytes_per_step'] / 1e9:.2f}",
                "" if row["device_used_bytes"] is None else gib(row["device_used_bytes"]),
            )
            for row in document["offload"]
        ],
    )
    link, cpu = document["link_bytes_per_second"], document["cpu_product_bytes_per_second"]
    threads = document["cpu_threads"]
    lines = [(f"bitsandbytes' product on the CPU, {threads} threads", f"{cpu / 1e9:.2f} GB/s of weights")]
    if link is not None:
        lines.insert(0, ("fetched over the link", f"{link / 1e9:.1f} GB/s"))
    report.table("A missing expert", ("how", "rate"), lines)


def shared_share(layer: int, layers: int) -> float:
    """P(a token shares an expert with the token before) at a layer."""
    place = layer * 31 / max(1, layers - 1)
    for before, after in pairwise(SHARED):
        if place <= after:
            return SHARED[before] + (SHARED[after] - SHARED[before]) * (place - before) / (after - before)
    return SHARED[31]


def make_trace(steps: int, rows: int, layers: int, seed: int) -> Tensor:
    """int64 [N, T, L, K]: chosen experts of 8, rows independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    share_L = torch.tensor([shared_share(layer, layers) for layer in range(layers)])
    trace = torch.empty(steps, rows, layers, _CHOICES, dtype=torch.int64)
    trace[0] = torch.rand(rows, layers, _EXPERTS, generator=generator).argsort(-1)[..., :_CHOICES]
    for step in range(1, steps):
        # The token's experts among the two of the last one, then among the other six, each in random order.
        last = torch.zeros(rows, layers, _EXPERTS).scatter_(-1, trace[step - 1], 1.0)
        order = torch.rand(rows, layers, _EXPERTS, generator=generator)
        old = (order + 2 * last).argsort(-1, descending=True)[..., :_CHOICES]
        new = (order - 2 * last).argsort(-1, descending=True)[..., :_CHOICES]
        shares = torch.rand(rows, layers, generator=generator) < share_L
        both = shares & (torch.rand(rows, layers, generator=generator) < 1 / 13)
        first = torch.where(shares, old[..., 0], new[..., 0])
        second = torch.where(both, old[..., 1], torch.where(shares, new[..., 0], new[..., 1]))
        trace[step] = torch.stack([first, second], -1)
    return trace


class TracedStep(DecodeStep):
    """A decoding step that goes by a trace; the router computes as ever, for its time and its weights."""

    def follow(self, trace_NTLK: Tensor) -> None:
        """From now on, over and over. Must be called before the step is captured."""
        self._trace, self._step = trace_NTLK, torch.zeros(1, dtype=torch.int64, device=trace_NTLK.device)

    def _route(self, layer: Layer, number: int, rows: Fp16Activations, which_T: Tensor) -> tuple[Tensor, Tensor]:
        _, weight_TK = super()._route(layer, number, rows, which_T)
        if number == 0:
            self._step.add_(1).remainder_(self._trace.shape[0])
        index: Any = self._trace.index_select(0, self._step)[0, : len(rows.x), number]
        return index.contiguous(), weight_TK
