"""The device's side of the engine: the cache, prompts, steps as CUDA graphs, and tokens on their way back.

A graph is captured for each batch bucket (1, 2, 4, ... rows) when it is first needed; rows that pad a batch belong to
page 0. Tokens stay on the device from step to step: the host reads them one step later, from pinned memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from finetune.errors import DeviceError
from finetune.infer.loading import ServedModels
from finetune.infer.offloaded import expert_bytes, least_slots, offload_experts, plan_slots
from finetune.infer.pages import PAGE, PagePool, page_bytes, pages_for
from finetune.infer.prefill import prefill
from finetune.infer.request import Event, Request
from finetune.infer.residency import CONTEXT_BYTES, PREFILL_TOKENS, EngineSettings, read_load, split_memory
from finetune.infer.rotary import RotaryTables
from finetune.infer.sampler import Chosen, RowSampling, choose
from finetune.infer.step import DecodeStep
from finetune.infer.text import AnswerText
from finetune.moe import experts_path


@dataclass(eq=False)
class Row:
    """A request that waits or runs.

    Attributes:
        model: the name of the model that answers.
        end_ids: tokens that end the answer.
        limit: the most tokens of the answer.
        cancelled: whether it is to end; set from any thread.
        tokens: tokens reported to the listener.
        newest: the device tensor with its last token, and the index in it.
        launched: how many tokens the device was asked for.
    """

    request: Request
    listen: Callable[[Event], None]
    model: str
    selector: int
    end_ids: frozenset[int]
    limit: int
    text: AnswerText
    sampling: RowSampling
    cancelled: bool = False
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    newest: tuple[Tensor, int] = field(default_factory=lambda: (torch.empty(0), 0))
    launched: int = 0
    finished: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.request.ids) + len(self.tokens)

    @property
    def position(self) -> int:
        """Position at which the newest launched token will be written."""
        return len(self.request.ids) + self.launched - 1


class Runner:
    """Runs prompts and steps of one model; used by the engine's thread alone.

    Raises:
        DeviceError: no memory for a cache of one full-length request.
    """

    def __init__(self, served: ServedModels, settings: EngineSettings):
        loaded = served.loaded
        self.arch, self.device = loaded.arch, loaded.device
        self.model: Any = loaded.model.eval()
        causal: Any = self.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
        self.causal = causal
        self.adapters = served.adapters
        dtype: torch.dtype = causal.dtype
        longest = settings.longest(int(causal.config.max_position_embeddings))
        if settings.device_gib is not None and self.device.type == "cuda":
            most = settings.device_gib * 2**30 - CONTEXT_BYTES
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), self.device)
        offload = served.experts_on == "host"
        for_kv, for_slots = split_memory(self.arch, dtype, self.device, settings, longest, offload=offload)
        size = page_bytes(self.arch, dtype)
        count = for_kv // size  # with the page for padding
        if count < 2:
            raise DeviceError(
                f"there is no memory for keys and values: a page of {PAGE} tokens takes {size / 2**20:.1f} MiB",
                where="--kv-gib" if settings.kv_gib is not None else str(self.device),
                allowed=f"{math.ceil(2000 * size / 2**30) / 1000:.3f} GiB or more",
                fix="give more with --kv-gib, shorten --max-length, or free the device",
            )
        self.max_length: int = min(longest, (count - 1) * PAGE)
        self._cache_counts: Tensor | None = None
        self._cache_counts_read: Tensor | None = None
        if offload:
            self._expert_bytes = expert_bytes(causal.get_submodule(experts_path(0)))
            self._cache_counts = self._offload(settings, max(0, for_slots) // self._expert_bytes)
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
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._page_counts: list[int] = []  # of each row, in the table
        self._last: list[Row] = []  # of the newest step, whose tokens are `_last_tokens`
        self._last_tokens = self._token_T

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

    def prompt_batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Neighbours of one selector whose prompts go through one forward pass."""
        batch: list[Row] = []
        tokens = 0
        for row in rows:
            if batch and (row.selector != batch[0].selector or tokens + row.length > PREFILL_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += row.length
        if batch:
            yield batch

    def prefill(self, rows: list[Row]) -> tuple[Tensor, Callable[[], Chosen]]:
        """The token after each row of one selector: on the device, int64 [T], and a function that waits for it."""
        self._last = []
        with self.active(rows[0].selector):
            logits_TV = prefill(
                self.causal,
                [(*row.request.ids, *row.tokens) for row in rows],
                [row.pages for row in rows],
                self.pool,
                self.rotary,
                [len(row.request.ids) for row in rows],
            )
        chosen = choose(logits_TV, [row.sampling for row in rows])
        return chosen.token_T, _to_host(chosen)

    def step(self, rows: list[Row]) -> tuple[Tensor, Callable[[], Chosen]]:
        """One step of all rows; results as `prefill`. The same rows in the same order are not arranged again."""
        count = len(rows)
        bucket = min(1 << (count - 1).bit_length(), self._token_T.numel())
        if self._cache_counts is not None:
            bucket = count  # rows that pad a batch would have experts fetched
        goes_on = rows == self._last
        self._last = []  # until this step has run
        if goes_on:
            self._token_T[:count].copy_(self._last_tokens)
            self._position_T[:count] += 1
        else:
            self._token_T[:count] = torch.stack([tokens_T[number] for tokens_T, number in (row.newest for row in rows)])
            self._send(self._position_T, [row.position for row in rows])
            self._send(self._adapter_T, [row.selector for row in rows])
        counts = [len(row.pages) for row in rows]
        if not goes_on or counts != self._page_counts:
            table = torch.zeros(self._page_TP.shape, dtype=torch.int32)
            for number, row in enumerate(rows):
                table[number, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
            self._send(self._page_TP, table)
            self._page_counts = counts
        chosen = choose(self._logits(bucket)[:count], [row.sampling for row in rows])
        self._last, self._last_tokens = rows, chosen.token_T
        if self._cache_counts is not None and self._cache_counts_read is not None:
            self._cache_counts_read.copy_(self._cache_counts, non_blocking=True)
        return chosen.token_T, _to_host(chosen)

    def cache_stats(self) -> dict[str, int]:
        """The `expert_*` of EngineStats, as of the newest finished step; none where all experts are resident."""
        if self._cache_counts_read is None:
            return {}
        _, hits, misses = self._cache_counts_read.sum(0).tolist()
        fetched = misses * self._expert_bytes
        return {"expert_hits": hits, "expert_misses": misses, "expert_fetched_bytes": fetched}

    def _offload(self, settings: EngineSettings, slots: int) -> Tensor:
        """Moves the experts behind so many slots; returns the counts of `offload_experts`."""
        load_LE = None if settings.routing is None else read_load(settings.routing, self.arch)
        plan = plan_slots(self.arch, slots, load_LE)
        if plan is None:
            each = f"{self._expert_bytes / 2**20:.0f} MiB each"
            raise DeviceError(
                f"the device has room for {slots} experts beside everything else",
                where="--device-gib" if settings.device_gib is not None else str(self.device),
                allowed=f"{least_slots(self.arch)} or more, {each}: one a layer, or all of one layer",
                fix="give more of the device, a shorter --max-length, or a smaller --kv-gib",
            )
        return offload_experts(self.causal, self.arch, plan, self.device)

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
        graph, logits_TV = self._graphs[bucket]
        graph.replay()
        return logits_TV

    def _decode(self, bucket: int) -> Tensor:
        return self.decode(
            self._token_T[:bucket],
            self._position_T[:bucket],
            self._page_TP[:bucket],
            self._adapter_T[:bucket],
            self.pool,
        )

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once outside the graph, so that kernels are compiled. It writes what the graph will write again.
        self._decode(bucket)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a server's other threads may touch the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._decode(bucket)
        return graph, logits


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
