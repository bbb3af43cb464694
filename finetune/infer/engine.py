"""The engine: requests in, tokens out, through the quantized experts that trained.

One thread owns the model. It admits waiting requests while pages and rows last, sends their prompts through the
model's own forward, and then steps all running rows together, a token each; rows join and leave at any step
(continuous batching, Orca, OSDI 2022): `batch.py`. On a GPU a step is one CUDA graph per batch bucket, and its tokens
are read one step later, so that the host's work (text, stop texts, listeners) happens while the device computes the
next step.

An error in one request ends that request. An error of the engine itself ends all running requests; the thread then
continues with an empty batch as long as a probe of the model works, else `failure` says why the engine is dead.

transformers' own continuous batching was considered first: it runs the model's modules, some 45 launches per layer for
one token (`step.py`), it serves one adapter, and its scheduler cannot use another forward.

Leaves out: prefix sharing, splitting long prompts into chunks (a prompt of 4096 tokens holds the others up for a
quarter of a second on an H100), speculative decoding, several GPUs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from finetune.errors import DataError, EngineError
from finetune.infer.batch import Batch, Counters, in_a_line
from finetune.infer.loading import ServedModels, chooses_offload, load_models
from finetune.infer.pages import PAGE
from finetune.infer.request import Event, FinishedEvent, Request
from finetune.infer.residency import EngineSettings
from finetune.infer.runner import Row, Runner
from finetune.infer.sampler import RowSampling
from finetune.infer.text import AnswerText, PromptEnd, Vocabulary, encode_messages, encode_text
from finetune.moe import ExpertsOn, LoadedModel

T = TypeVar("T")
Listener = Callable[[Event], None]
log = logging.getLogger(__name__)
# After so many restarts without a token between them the engine gives up.
RESTARTS = 3


@dataclass(kw_only=True)
class EngineStats(Counters):
    """A snapshot. `expert_*` are None where all experts are resident."""

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages: int
    kv_page_tokens: int
    expert_hits: int | None = None
    expert_misses: int | None = None
    expert_fetched_bytes: int | None = None


class RequestHandle:
    """A submitted request, to cancel it by."""

    def __init__(self, engine: Engine, row: Row):
        self._engine, self._row = engine, row

    def cancel(self) -> None:
        """May be called from any thread; a FinishedEvent "cancelled" follows unless the request has already ended."""
        self._row.cancelled = True
        self._engine._wake()


class Engine:
    """Serves one loaded model and its adapters; a context manager that closes it on exit.

    Attributes:
        failure: the error that ended the engine for good, if any; its `__cause__` is the exception.
        restarts: how often an error of the engine itself ended all running requests.
    """

    def __init__(self, served: ServedModels, path: str, settings: EngineSettings):
        self.model_path, self.settings = path, settings
        self.names = tuple(served.selectors)
        self.loaded = served.loaded
        self.failure: EngineError | None = None
        self.restarts = 0
        self._selectors = dict(served.selectors)
        # An adapter uses the tokenizer, template and end of turn that it was trained with, not its base's.
        self._tokenizers = {name: served.tokenizers.get(name, self.loaded.tokenizer) for name in self.names}
        self._vocabularies = {name: Vocabulary(tokenizer) for name, tokenizer in self._tokenizers.items()}
        self._runner = Runner(served, settings)
        self.max_length = self._runner.max_length
        self._end_ids = {name: _end_ids(self.loaded, tokenizer) for name, tokenizer in self._tokenizers.items()}
        self._lock = threading.Condition()
        self._submitted: deque[Row] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._counters = Counters()
        self._batch = Batch(self._runner, settings.max_batch, self._counters)
        self._checked: tuple[int, ...] = ()
        self._told_at_restarts: deque[int] = deque(maxlen=RESTARTS)
        self._closing, self._draining = False, True
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
            FinetuneError: as `adapter.load`; `AdapterError` for adapters that do not go together; `DeviceError` for a
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

    def submit(self, request: Request, listen: Listener) -> RequestHandle:
        """Queues a request and returns at once. `listen` runs on the engine's thread and must be quick; if it raises,
        its request ends.

        Raises:
            DataError: an unknown model, an empty prompt, or one that leaves no room for a token.
            EngineError: the engine failed for good.
            RuntimeError: the engine is closed.
        """
        row = self._row(request, listen)
        with self._lock:
            self._require_open()
            self._submitted.append(row)
            self._counters.requests += 1
            self._lock.notify()
        return RequestHandle(self, row)

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request; closing the generator cancels it."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, FinishedEvent):
                    return
        finally:
            handle.cancel()

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
            continues: whether the answer continues the last message, which must be the assistant's.

        Raises:
            DataError: an unknown model, no chat template, or one that refuses the conversation.
        """
        return tuple(encode_messages(self.tokenizer_of(model), messages, continues=continues))

    def encode_text(self, text: str, model: str | None = None) -> tuple[int, ...]:
        """Ids of a text with the beginning-of-sequence token; a control token spelled out in it stays text."""
        return tuple(encode_text(self.tokenizer_of(model), text))

    def prompt_end(self, ids: Sequence[int], model: str | None = None) -> PromptEnd:
        """The value of `Request.after` for answers that continue the text of a prompt.

        Raises:
            DataError: an unknown model.
        """
        return PromptEnd.of(self._vocabularies[self._name(model)], ids)

    def run(self, function: Callable[[LoadedModel], T], model: str | None = None) -> T:
        """Runs a function on a model between two steps, with its adapter and its tokenizer; waits for the result.

        Raises:
            DataError: an unknown model.
            EngineError: the engine failed for good.
        """
        name = self._name(model)
        selector, loaded = self._selectors[name], replace(self.loaded, tokenizer=self._tokenizers[name])
        answer: Future[T] = Future()

        def job() -> None:
            try:
                with self._runner.active(selector):
                    answer.set_result(function(loaded))
            except BaseException as error:  # noqa: BLE001 # handed to the caller, whose function it is
                answer.set_exception(error)

        with self._lock:
            self._require_open()
            self._jobs.append(job)
            self._lock.notify()
        return answer.result()

    def stats(self) -> EngineStats:
        with self._lock:
            pool = self._runner.pool
            return EngineStats(
                running=len(self._batch.running),
                waiting=len(self._batch.waiting) + len(self._submitted),
                kv_pages_used=pool.used,
                kv_pages=pool.pages,
                kv_page_tokens=PAGE,
                **self._runner.cache_stats(),
                **asdict(self._counters),
            )

    def close(self, *, drain: bool = True) -> None:
        """Ends the engine's thread. With `drain` running and waiting requests finish first; else they are cancelled."""
        with self._lock:
            self._closing, self._draining = True, drain
            self._lock.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def _require_open(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._closing:
            raise RuntimeError("the engine is closed")

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

    def _row(self, request: Request, listen: Listener) -> Row:
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
        if request.ids is not self._checked:  # the answers to one prompt share its ids
            if not 0 <= min(request.ids) <= max(request.ids) < vocab:
                raise DataError("the prompt has unknown token ids", where="prompt", allowed=f"0 to {vocab - 1}")
            self._checked = request.ids
        sampling = RowSampling(request.sampling, request.ids)
        name = self._name(request.model)
        text = AnswerText(self._vocabularies[name], request.sampling.stop, request.after)
        limit = min(request.sampling.max_new_tokens, room)
        return Row(request, listen, name, self._selectors[name], self._end_ids[name], limit, text, sampling)

    # ---- the engine's thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._batch.turn()
                except Exception as error:  # noqa: BLE001 # no request's fault; whether the engine goes on is seen to here
                    self._restart(error)
        except Exception as error:
            log.exception("the engine cannot go on")
            self.failure = _failed(error, self.model_path, "start it again; the traceback is in the log")
            self.failure.__cause__ = error
        finally:
            with self._lock:
                self._closing = True
                self._batch.waiting += self._submitted
                self._submitted.clear()
            self._batch.end(self.failure)
            for job in self._jobs:
                job()

    def _restart(self, error: Exception) -> None:
        """Ends all running and waiting requests, which leaves an empty batch.

        Raises:
            Exception: the probe fails, or no token was generated between the last restarts.
        """
        log.error("an error of the engine ends all running answers", exc_info=error)
        told = self._counters.completion_tokens
        self._told_at_restarts.append(told)
        if list(self._told_at_restarts) == [told] * RESTARTS:
            raise error
        self._runner.probe()
        self.restarts += 1
        self._batch.end(_failed(error, self.model_path, "ask again; the traceback is in the log"))

    def _wait_for_work(self) -> bool:
        with self._lock:
            while not (self._submitted or self._jobs or self._batch.busy):
                if self._closing:
                    return False
                self._lock.wait()
            jobs, self._jobs = list(self._jobs), deque()
            self._batch.waiting += self._submitted
            self._submitted.clear()
        if not self._draining:
            self._batch.end(None)
        for job in jobs:
            job()
        return True


def _failed(error: Exception, where: str, fix: str) -> EngineError:
    return EngineError(f"the engine failed while it answered: {in_a_line(error)}", where=where, fix=fix)


def _end_ids(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's, and those of the base's generation config."""
    config = loaded.model.generation_config
    listed = None if config is None else config.eos_token_id
    ids = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
