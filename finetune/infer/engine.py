"""The engine: requests in, tokens out, through the quantized experts that trained.

One thread owns the model. It admits waiting requests while pages and rows last, sends their prompts through the
model's own forward, and then steps all running rows together, a token each; rows join and leave at any step
(continuous batching, Orca, OSDI 2022). On a GPU a step is one CUDA graph per batch bucket, and its tokens are read one
step later, so that the host's work (text, stop texts, listeners) happens while the device computes the next step.

transformers' own continuous batching was looked at first: it runs the model's modules, some 45 launches a layer for
one token (`step.py`), one adapter a server, and its scheduler does not hand its steps to another forward.

Leaves out: prefix sharing, splitting long prompts into chunks (a prompt of 4096 tokens holds the others up for a
quarter of a second on an H100), speculative decoding, several GPUs.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune.errors import DataError
from finetune.infer.encode import encode_messages, encode_text
from finetune.infer.loading import ServedModels, chooses_offload, load_models
from finetune.infer.request import Event, FinishedEvent, FinishReason, Request, TokenEvent
from finetune.infer.runner import Runner
from finetune.infer.sampler import Chosen, RowSampling
from finetune.infer.settings import EngineSettings
from finetune.infer.text import AnswerText
from finetune.model import ExpertsOn, LoadedModel

T = TypeVar("T")
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; the counters run since the start. `expert_*` are None where all experts are resident."""

    running: int
    waiting: int
    prompt_tokens: int
    completion_tokens: int
    requests: int
    cancelled: int
    kv_pages_used: int
    kv_pages: int
    kv_page_tokens: int
    expert_hits: int | None = None
    expert_misses: int | None = None
    expert_fetched_bytes: int | None = None


class Ticket:
    """A submitted request."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.cancelled = False

    def cancel(self) -> None:
        """From any thread; a FinishedEvent "cancelled" follows, unless the request had ended."""
        self.cancelled = True
        self._engine._wake()


@dataclass(eq=False)
class _Row:
    """A request on its way."""

    request: Request
    listen: Listener
    ticket: Ticket
    selector: int
    end_ids: frozenset[int]
    limit: int
    text: AnswerText
    sampling: RowSampling
    pages: list[int] = field(default_factory=list)
    newest: tuple[Tensor, int] = field(default_factory=lambda: (torch.empty(0), 0))  # its last token, on the device
    launched: int = 0  # tokens asked of the device
    told: int = 0  # tokens told to the listener
    finished: bool = False

    @property
    def position(self) -> int:
        """Where the newest launched token will be written."""
        return len(self.request.ids) + self.launched - 1


@dataclass(frozen=True)
class _Pending:
    """Tokens on their way from the device, of these rows."""

    rows: list[_Row]
    ready: Callable[[], Chosen]


class Engine:
    """Serves one loaded model and its adapters; a context manager that closes itself. See the file."""

    def __init__(self, served: ServedModels, path: str, settings: EngineSettings):
        self.model_path, self.settings = path, settings
        self.names = tuple(served.selectors)
        self.loaded = served.loaded
        self.failure: BaseException | None = None
        self._selectors = dict(served.selectors)
        # An adapter speaks as it was trained: its tokenizer, template and end of turn, not its base's.
        self._tokenizers = {name: served.tokenizers.get(name, self.loaded.tokenizer) for name in self.names}
        self._runner = Runner(served, settings)
        self.max_length = self._runner.max_length
        self._end_ids = {name: _end_ids(self.loaded, tokenizer) for name, tokenizer in self._tokenizers.items()}
        self._lock = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._counters = dict.fromkeys(("prompt_tokens", "completion_tokens", "requests", "cancelled"), 0)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        adapters: Mapping[str, str] | None = None,
        name: str | None = None,
        base: str | None = None,
        device: str = "auto",
        settings: EngineSettings | None = None,
    ) -> Engine:
        """Loads a base, merged, adapter or non-MoE folder, or a hub id, and further adapters by name.

        Raises:
            FinetuneError: as `model.load`; `AdapterError` for adapters that do not go together; `DeviceError` for a
                device with too little room.
        """
        settings = settings or EngineSettings()
        offload = chooses_offload(path, base, device, settings)
        experts_on: ExpertsOn = "host" if offload else "device"
        served = load_models(path, adapters or {}, name=name, base=base, device=device, experts_on=experts_on)
        return cls(served, path, settings)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    # ---- asked from any thread -------------------------------------------------------------------------------

    def submit(self, request: Request, listen: Listener) -> Ticket:
        """Queues a request; does not wait. `listen` runs on the engine's thread, must be quick and not raise.

        Raises:
            DataError: an unknown model, an empty prompt, or one that leaves no room for a token.
            RuntimeError: the engine is closed, or its thread has died.
        """
        row = self._row(request, listen)
        with self._lock:
            if self.failure is not None or self._closing:
                raise RuntimeError("the engine is closed") from self.failure
            self._waiting.append(row)
            self._counters["requests"] += 1
            self._lock.notify()
        return row.ticket

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request; closing the generator cancels it."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, FinishedEvent):
                    return
        finally:
            ticket.cancel()

    def tokenizer_of(self, model: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template, that a model was trained with.

        Raises:
            DataError: an unknown model.
        """
        return self._tokenizers[self._name(model)]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], model: str | None = None, *, continues: bool = False
    ) -> tuple[int, ...]:
        """Ids of a conversation of role and content, up to where the answer begins, as this model was trained.

        Args:
            continues: the answer goes on in the last message, which is the assistant's.

        Raises:
            DataError: an unknown model, no chat template, or one that refuses the conversation.
        """
        return tuple(encode_messages(self.tokenizer_of(model), messages, continues=continues))

    def encode_text(self, text: str, model: str | None = None) -> tuple[int, ...]:
        """Ids of a text with the beginning-of-sequence token; a control token spelled out in it stays text."""
        return tuple(encode_text(self.tokenizer_of(model), text))

    def run(self, function: Callable[[LoadedModel], T], model: str | None = None) -> T:
        """Runs a function of a model between two steps, with its adapter active and its tokenizer; waits for it.

        Raises:
            DataError: an unknown model.
        """
        name = self._name(model)
        selector, loaded = self._selectors[name], replace(self.loaded, tokenizer=self._tokenizers[name])
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def job() -> None:
            try:
                with self._runner.active(selector):
                    answer.put((function(loaded), None))
            except BaseException as error:  # noqa: BLE001 # handed to the caller, whose function it is
                answer.put((None, error))

        with self._lock:
            if self.failure is not None or self._closing:
                raise RuntimeError("the engine is closed") from self.failure
            self._jobs.append(job)
            self._lock.notify()
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def stats(self) -> EngineStats:
        with self._lock:
            pool = self._runner.pool
            cache = self._runner.cache_stats()
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                kv_pages_used=pool.used,
                kv_pages=pool.pages,
                kv_page_tokens=self._runner.page_tokens,
                expert_hits=None if cache is None else cache.hits,
                expert_misses=None if cache is None else cache.misses,
                expert_fetched_bytes=None if cache is None else cache.misses * cache.expert_bytes,
                **self._counters,
            )

    def close(self, *, drain: bool = True) -> None:
        """Ends the engine's thread. `drain` finishes what runs and waits first; else all of it is cancelled."""
        with self._lock:
            self._closing = True
            if not drain:
                for row in [*self._waiting, *self._running]:
                    row.ticket.cancelled = True
            self._lock.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def _name(self, model: str | None) -> str:
        name = self.names[0] if model is None else model
        if name not in self._selectors:
            raise DataError(
                f"there is no model {name!r} here",
                where="model",
                allowed=", ".join(self.names),
                fix="ask for one of them",
            )
        return name

    def _row(self, request: Request, listen: Listener) -> _Row:
        if not request.ids:
            raise DataError("the prompt is empty", where="prompt", fix="give at least one token")
        room = self.max_length - len(request.ids)
        if room < 1:
            raise DataError(
                f"the prompt has {len(request.ids)} tokens",
                where="prompt",
                allowed=f"fewer than {self.max_length}",
                fix="shorten the prompt",
            )
        vocab = self.loaded.arch.vocab
        if not 0 <= min(request.ids) <= max(request.ids) < vocab:
            raise DataError("the prompt has unknown token ids", where="prompt", allowed=f"0 to {vocab - 1}")
        sampling = RowSampling(request.sampling, request.ids)
        name = self._name(request.model)
        text = AnswerText(self._tokenizers[name], request.sampling.stop, request.ids if request.continues else ())
        limit = min(request.sampling.max_new_tokens, room)
        return _Row(request, listen, Ticket(self), self._selectors[name], self._end_ids[name], limit, text, sampling)

    # ---- the engine's thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            pending: deque[_Pending] = deque()
            while self._wait_for_work(pending):
                self._drop_finished()
                pending += self._admit()
                rows = [row for row in self._running if row.launched < row.limit and not row.finished]
                if rows:
                    pending.append(self._launch(rows))
                # The newest step runs on the device while those before it are told.
                while len(pending) > (1 if rows else 0):
                    self._tell(pending.popleft())
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self._closing = True
                left = [*self._running, *self._waiting]
                self._running, self._waiting = [], deque()
            for row in left:
                self._finish(row, "cancelled")
            for job in self._jobs:
                job()

    def _wait_for_work(self, pending: deque[_Pending]) -> bool:
        with self._lock:
            while not (self._waiting or self._running or self._jobs or pending):
                if self._closing:
                    return False
                self._lock.wait()
            jobs, self._jobs = list(self._jobs), deque()
        for job in jobs:
            job()
        return True

    def _drop_finished(self) -> None:
        for row in self._running:
            if row.ticket.cancelled and not row.finished:
                self._finish(row, "cancelled")
        with self._lock:
            gone = [row for row in self._waiting if row.ticket.cancelled]
            self._waiting = deque(row for row in self._waiting if not row.ticket.cancelled)
            ended = [row for row in self._running if row.finished]
            self._running = [row for row in self._running if not row.finished]
            for row in ended:
                # What the device still writes there comes before what the next owner writes.
                self._runner.pool.give_back(row.pages)
        for row in gone:
            self._finish(row, "cancelled")

    def _admit(self) -> list[_Pending]:
        """Prompts of waiting requests, first come first served, as rows and pages last."""
        admitted: list[_Row] = []
        with self._lock:
            while self._waiting and len(self._running) < self.settings.max_batch:
                row = self._waiting[0]
                pages = self._runner.reserve(len(row.request.ids) + row.limit)
                if pages is None:
                    break
                row.pages = pages
                admitted.append(self._waiting.popleft())
                self._running.append(row)
                self._counters["prompt_tokens"] += len(row.request.ids)
        pending = []
        for rows in self._runner.prompt_batches(admitted, lambda row: (row.selector, len(row.request.ids))):
            prompts = [row.request.ids for row in rows]
            tokens, ready = self._runner.prefill(
                rows[0].selector, prompts, [row.pages for row in rows], [row.sampling for row in rows]
            )
            for number, row in enumerate(rows):
                row.launched, row.newest = 1, (tokens, number)
            pending.append(_Pending(rows, ready))
        return pending

    def _launch(self, rows: list[_Row]) -> _Pending:
        tokens, ready = self._runner.step(
            rows,
            [row.newest for row in rows],
            [row.position for row in rows],
            [row.pages for row in rows],
            [row.selector for row in rows],
            [row.sampling for row in rows],
        )
        for number, row in enumerate(rows):
            row.launched, row.newest = row.launched + 1, (tokens, number)
        return _Pending(rows, ready)

    def _tell(self, pending: _Pending) -> None:
        chosen = pending.ready()
        tokens = chosen.token_T.tolist()
        logprobs = None if chosen.logprob_T is None else chosen.logprob_T.tolist()
        for number, (row, token) in enumerate(zip(pending.rows, tokens, strict=True)):
            if row.finished or row.ticket.cancelled:
                continue
            row.told += 1
            self._counters["completion_tokens"] += 1
            sampling = row.request.sampling
            ends = token in row.end_ids and not sampling.ignore_eos
            text = "" if ends else row.text.add(token)
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if sampling.logprobs is not None and logprobs is not None:
                logprob, top = logprobs[number], _top(chosen, number, sampling.logprobs)
            row.listen(TokenEvent(token, text, logprob, top))
            if ends or row.text.stop is not None:
                self._finish(row, "stop")
            elif row.told == row.limit:
                self._finish(row, "length")

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        row.finished = True
        self._counters["cancelled"] += reason == "cancelled"
        text = row.text.end()
        if row.text.stop is not None and reason == "length":
            reason = "stop"
        row.listen(FinishedEvent(reason, len(row.request.ids), row.told, text, row.text.stop))


def _top(chosen: Chosen, number: int, count: int) -> tuple[tuple[int, float], ...]:
    assert chosen.top_ids is not None
    assert chosen.top_logprobs is not None
    ids, values = chosen.top_ids[number, :count].tolist(), chosen.top_logprobs[number, :count].tolist()
    return tuple(zip(ids, values, strict=True))


def _end_ids(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's, and those of the base's generation config."""
    config = loaded.model.generation_config
    listed = None if config is None else config.eos_token_id
    ids = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
