"""The device's side of the engine: the cache, prompts, steps as CUDA graphs, and tokens on their way back.

A graph is captured for each batch bucket (1, 2, 4, ... rows) when it is first needed; rows that pad a batch belong to
page 0. Tokens stay on the device from step to step: the host reads them one step later, from pinned memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from finetune.errors import DeviceError
from finetune.infer.loading import ServedModels
from finetune.infer.offloaded import expert_bytes, least_slots, offload_experts, plan_slots
from finetune.infer.pages import PAGE, PagePool, page_bytes, pages_for
from finetune.infer.prefill import prefill
from finetune.infer.residency import CONTEXT_BYTES, PREFILL_TOKENS, EngineSettings, read_load, split_memory
from finetune.infer.rotary import RotaryTables
from finetune.infer.sampler import Chosen, RowSampling, choose
from finetune.infer.step import DecodeStep
from finetune.moe import MoeArch, experts_path

R = TypeVar("R")


@dataclass(frozen=True)
class CacheStats:
    """Of offloaded experts: needed ones that were found in a slot, and those fetched; bytes of one expert."""

    hits: int
    misses: int
    expert_bytes: int


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits_TV: Tensor


class Runner:
    """Runs prompts and steps of one model; used by the engine's thread alone.

    Raises:
        DeviceError: no memory for a cache of one full-length request.
    """

    page_tokens = PAGE

    def __init__(self, served: ServedModels, settings: EngineSettings):
        loaded = served.loaded
        self.arch, self.device = loaded.arch, loaded.device
        self.model: Any = loaded.model.eval()
        causal: Any = self.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
        self.causal = causal
        self.adapters = served.adapters
        dtype: torch.dtype = causal.dtype
        positions = int(causal.config.max_position_embeddings)
        longest: int = settings.longest(positions)
        if settings.device_gib is not None and self.device.type == "cuda":
            most = settings.device_gib * 2**30 - CONTEXT_BYTES
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), self.device)
        offload = served.experts_on == "host"
        split = split_memory(
            self.arch,
            dtype,
            self.device,
            offload=offload,
            device_gib=settings.device_gib,
            kv_gib=settings.kv_gib,
            wanted_kv=(settings.max_batch * pages_for(longest) + 1) * page_bytes(self.arch, dtype),
            longest=longest,
            max_batch=settings.max_batch,
        )
        count = _pool_pages(self.arch, dtype, self.device, settings, split.kv)
        self.max_length: int = min(longest, (count - 1) * PAGE)
        self._cache_counts: Tensor | None = None
        self._cache_counts_read: Tensor | None = None
        if offload:
            self._expert_bytes = expert_bytes(causal.get_submodule(experts_path(0)))
            self._cache_counts = _offload(causal, self.arch, self.device, settings, split.slots)
            self._cache_counts_read = torch.zeros(
                self._cache_counts.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda"
            )
        self.pool = PagePool(self.arch, count, dtype, self.device)
        with torch.inference_mode():
            self.rotary = RotaryTables(self.causal.model, self.max_length)
            self.decode = DecodeStep(self.causal, self.arch, served.adapters, self.rotary)
        rows, width = settings.max_batch, pages_for(self.max_length)
        self._token_T = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._position_T = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._adapter_T = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._page_TP = torch.zeros(rows, width, dtype=torch.int32, device=self.device)
        self._graphs: dict[int, _Graph] = {}
        self._page_counts: list[int] = []  # of each row, in the table
        self._last: list[object] = []
        self._last_chosen: Tensor | None = None

    def probe(self) -> None:
        """Runs one token through the base and waits for it; raises torch's error if the device no longer works."""
        with self.active(0):
            prefill(self.causal, [[0]], [[0]], self.pool, self.rotary)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def active(self, selector: int) -> Iterator[None]:
        """Inside the block the model's own forward uses this adapter, or the base for 0."""
        if not isinstance(self.model, PeftModel):
            yield
        elif selector == 0:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(self.adapters[selector - 1])
            yield

    def prompt_batches(self, rows: Sequence[R], describe: Callable[[R], tuple[int, int]]) -> Iterator[list[R]]:
        """Rows of one selector whose prompts go through one forward pass; `describe` gives selector and length."""
        batch: list[R] = []
        tokens, current = 0, None
        for row in rows:
            selector, length = describe(row)
            if batch and (selector != current or tokens + length > PREFILL_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens, current = tokens + length, selector
        if batch:
            yield batch

    def prefill(
        self,
        selector: int,
        prompts: Sequence[Sequence[int]],
        pages: Sequence[Sequence[int]],
        samplings: Sequence[RowSampling],
        began: Sequence[int],
    ) -> tuple[Tensor, Callable[[], Chosen]]:
        """The token after each prompt: on the device [N], and a function that waits for it on the host.

        Args:
            began: as `prefill.prefill`.
        """
        self._last = []
        with self.active(selector):
            logits = prefill(self.causal, prompts, pages, self.pool, self.rotary, began)
        chosen = choose(logits, samplings)
        return chosen.token_T, _to_host(chosen)

    def step(
        self,
        rows: Sequence[object],
        tokens: Sequence[tuple[Tensor, int]],
        positions: Sequence[int],
        pages: Sequence[Sequence[int]],
        selectors: Sequence[int],
        samplings: Sequence[RowSampling],
    ) -> tuple[Tensor, Callable[[], Chosen]]:
        """One step of all rows; results as `prefill`.

        Args:
            rows: identify the batch, so that the same rows need not be arranged again.
            tokens: device tensor and index of each row's newest token.
            positions: the position of that token.
        """
        count = len(rows)
        bucket = min(1 << (count - 1).bit_length(), self._token_T.numel())
        if self._cache_counts is not None:
            bucket = count  # rows that pad a batch would have experts fetched
        goes_on = self._last_chosen is not None and list(rows) == self._last
        self._last = []  # until this step has run
        if goes_on and self._last_chosen is not None:
            self._token_T[:count].copy_(self._last_chosen)
            self._position_T[:count] += 1
        else:
            self._token_T[:count] = torch.stack([source[index] for source, index in tokens])
            self._send(self._position_T, positions)
            self._send(self._adapter_T, selectors)
        counts = [len(own) for own in pages]
        if not goes_on or counts != self._page_counts:
            self._send_pages(pages)
            self._page_counts = counts
        logits = self._logits(bucket)
        chosen = choose(logits[:count], samplings)
        self._last, self._last_chosen = list(rows), chosen.token_T
        if self._cache_counts is not None and self._cache_counts_read is not None:
            self._cache_counts_read.copy_(self._cache_counts, non_blocking=True)
        return chosen.token_T, _to_host(chosen)

    def cache_stats(self) -> CacheStats | None:
        """As of the newest finished step; None where all experts are resident."""
        if self._cache_counts_read is None:
            return None
        _, hits, misses = self._cache_counts_read.sum(0).tolist()
        return CacheStats(hits, misses, self._expert_bytes)

    def _send_pages(self, pages: Sequence[Sequence[int]]) -> None:
        table = torch.zeros(self._page_TP.shape, dtype=torch.int32)
        for row, own in enumerate(pages):
            table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        self._send(self._page_TP, table)

    def _send(self, target: Tensor, values: Sequence[int] | Tensor) -> None:
        """Writes the values to the beginning of `target` and zeros behind them; the host does not wait."""
        host = torch.zeros(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
        host[: len(values)] = torch.as_tensor(values, dtype=target.dtype)
        target.copy_(host, non_blocking=True)

    def _logits(self, bucket: int) -> Tensor:
        if self.device.type != "cuda":
            return self._decode(bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        captured = self._graphs[bucket]
        captured.graph.replay()
        return captured.logits_TV

    def _decode(self, bucket: int) -> Tensor:
        return self.decode(
            self._token_T[:bucket],
            self._position_T[:bucket],
            self._page_TP[:bucket],
            self._adapter_T[:bucket],
            self.pool,
        )

    def _capture(self, bucket: int) -> _Graph:
        # Once outside the graph, so that kernels are compiled. It writes what the graph will write again.
        self._decode(bucket)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a server's other threads may touch the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._decode(bucket)
        return _Graph(graph, logits)


def _to_host(chosen: Chosen) -> Callable[[], Chosen]:
    if not chosen.token_T.is_cuda:
        return lambda: chosen
    tensors = [chosen.token_T, chosen.finite_T, chosen.logprob_T, chosen.top_ids, chosen.top_logprobs]
    copies = [None if x is None else torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        if copy is not None and x is not None:
            copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def ready() -> Chosen:
        event.synchronize()
        assert copies[0] is not None
        assert copies[1] is not None
        return Chosen(copies[0], copies[1], *copies[2:])

    return ready


def _offload(causal: Any, arch: MoeArch, device: torch.device, settings: EngineSettings, room: int) -> Tensor:
    load_LE = None if settings.routing is None else read_load(settings.routing, arch)
    size = expert_bytes(causal.get_submodule(experts_path(0)))
    plan = plan_slots(arch, max(0, room) // size, load_LE)
    if plan is None:
        raise DeviceError(
            f"the device has room for {max(0, room) // size} experts beside everything else",
            where="--device-gib" if settings.device_gib is not None else str(device),
            allowed=f"{least_slots(arch)} or more, {size / 2**20:.0f} MiB each: one a layer, or all of one layer",
            fix="give more of the device, a shorter --max-length, or a smaller --kv-gib",
        )
    return offload_experts(causal, arch, plan, device)


def _pool_pages(arch: MoeArch, dtype: torch.dtype, device: torch.device, settings: EngineSettings, room: int) -> int:
    """Pages of the pool, with the one for padding."""
    size = page_bytes(arch, dtype)
    count = room // size
    if count < 2:
        raise DeviceError(
            f"there is no memory for keys and values: a page of {PAGE} tokens takes {size / 2**20:.1f} MiB",
            where="--kv-gib" if settings.kv_gib is not None else str(device),
            allowed=f"{math.ceil(2000 * size / 2**30) / 1000:.3f} GiB or more",
            fix="give more with --kv-gib, shorten --max-length, or free the device",
        )
    return count
