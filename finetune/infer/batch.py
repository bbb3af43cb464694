"""The rows that decode together: which wait, which run, which is pre-empted, and which one an error belongs to.

Waiting rows are admitted first come first served while places and pages last. A row gets a page when its next token
needs one. If none is left, the row that came last is pre-empted: its pages go to the rows before it, and it waits,
first in line, until its prompt and what it has generated can be recomputed. Its answer is the same as if it had never
waited, except that a prompt's pass rounds otherwise than steps do: no random number is drawn twice. A row is admitted
only while a page is left for every four running rows, enough for about 16 steps, so that rows do not come and go.

An error in one row ends that row. If a pass over several rows fails, it is run again row by row, and a row that fails
alone ends with the error; a probe of the model then shows whether anything still works. If not, the exception is raised
to the engine.

Leaves out: swapping pages to the host; recomputing a long answer costs one prompt of its length.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from finetune.errors import EngineError, FinetuneError
from finetune.infer.request import FinishedEvent, FinishReason, TokenEvent
from finetune.infer.runner import Row, Runner
from finetune.infer.sampler import Chosen

log = logging.getLogger(__name__)
_Ready = Callable[[], Chosen]  # waits for tokens that are on their way from the device
_Pending = tuple[list[Row], _Ready]


@dataclass
class Counters:
    """Counts since the start; `prompt_tokens` of admitted requests, `completion_tokens` reported to listeners."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    preempted: int = 0


class Batch:
    """The rows of one runner. Only the engine's thread may use it; others may read how many rows there are."""

    def __init__(self, runner: Runner, max_batch: int, counters: Counters):
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._runner, self._max_batch, self._counters = runner, max_batch, counters
        self._pending: deque[_Pending] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._pending)

    def turn(self) -> None:
        """Lets rows join and leave, then runs one step of all rows.

        Raises:
            Exception: nothing works any more.
        """
        self._drop_finished()
        self._admit()
        rows = self._with_pages([row for row in self.running if row.launched < row.limit and not row.finished])
        if rows:
            self._pending += self._attempt(rows, self._runner.step)
        # The newest step runs on the device while the tokens before it are reported.
        while len(self._pending) > (1 if rows else 0):
            self._tell(*self._pending.popleft())

    def end(self, error: FinetuneError | None) -> None:
        """Ends all rows where they are, with the error if there is one, and frees their pages."""
        for row in [*self.running, *self.waiting]:
            if not row.finished:
                with self._boundary(row):
                    self._finish(row, "cancelled" if error is None else "error", error)
        self._pending.clear()
        self._drop_finished()

    # ---- joining and leaving ---------------------------------------------------------------------------------------

    def _drop_finished(self) -> None:
        for row in [*self.running, *self.waiting]:
            if row.cancelled and not row.finished:
                with self._boundary(row):
                    self._finish(row, "cancelled")
            if row.finished:
                # The device finishes writing there before the next owner writes.
                self._runner.pool.free(row.pages)
        self.running = [row for row in self.running if not row.finished]
        self.waiting = deque(row for row in self.waiting if not row.finished)

    def _admit(self) -> None:
        admitted: list[Row] = []
        while self.waiting and len(self.running) < self._max_batch:
            row = self.waiting[0]
            on_its_way = len(row.tokens) < row.launched  # the last token before it made room
            if on_its_way or not self._runner.pool.allocate(row.pages, row.length + 1, spare=len(self.running) // 4):
                break
            self.running.append(self.waiting.popleft())
            admitted.append(row)
            if not row.tokens:
                self._counters.prompt_tokens += len(row.request.ids)
        for rows in self._runner.prompt_batches(admitted):
            self._pending += self._attempt(rows, self._runner.prefill)

    def _with_pages(self, rows: list[Row]) -> list[Row]:
        """The rows, oldest first, that have a page for their newest token; pre-empts others where pages run out."""
        number = 0
        while number < len(rows):
            if self._runner.pool.allocate(rows[number].pages, rows[number].position + 1):
                number += 1
            else:
                self._preempt(rows.pop())
        return rows

    def _preempt(self, row: Row) -> None:
        self._runner.pool.free(row.pages)
        self.running.remove(row)
        self.waiting.appendleft(row)
        self._counters.preempted += 1

    # ---- the device ------------------------------------------------------------------------------------------------

    def _attempt(self, rows: list[Row], run: Callable[[list[Row]], tuple[Tensor, _Ready]]) -> list[_Pending]:
        """Runs the rows together or, if that fails, each alone; ends those that fail alone."""
        try:
            tokens_T, ready = run(rows)
        except Exception as error:  # noqa: BLE001 # of one request, for all that is known; see the file
            for row in rows:
                row.sampling.go_to(row.launched)
            if len(rows) == 1:
                self._runner.probe()
                self._fail(rows[0], error)
                return []
        else:
            for number, row in enumerate(rows):
                row.launched, row.newest = row.launched + 1, (tokens_T, number)
            return [(rows, ready)]
        # Here, where the exception no longer holds on to what the failed pass allocated.
        return [pending for row in rows for pending in self._attempt([row], run)]

    # ---- reporting -------------------------------------------------------------------------------------------------

    def _tell(self, rows: list[Row], ready: _Ready) -> None:
        try:
            chosen = ready()
        except Exception as error:  # noqa: BLE001 # the device tells late what went wrong
            self._runner.probe()
            for row in rows:
                self._fail(row, error)
            return
        tokens, finite = chosen.token_T.tolist(), chosen.finite_T.tolist()
        for number, row in enumerate(rows):
            if row.finished or row.cancelled:
                continue
            with self._boundary(row):
                if finite[number]:
                    self._tell_token(row, tokens[number], chosen, number)
                else:
                    self._finish(row, "error", _not_finite(row))

    def _tell_token(self, row: Row, token: int, chosen: Chosen, number: int) -> None:
        row.tokens.append(token)
        self._counters.completion_tokens += 1
        sampling = row.request.sampling
        ends = token in row.end_ids and not sampling.ignore_eos
        text = "" if ends else row.text.add(token)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if sampling.logprobs is not None and chosen.logprob_T is not None:
            assert chosen.top_ids is not None
            assert chosen.top_logprobs is not None
            logprob, count = float(chosen.logprob_T[number]), sampling.logprobs
            ids, values = chosen.top_ids[number, :count].tolist(), chosen.top_logprobs[number, :count].tolist()
            top = tuple(zip(ids, values, strict=True))
        row.listen(TokenEvent(token, text, logprob, top))
        if ends or row.text.stop is not None:
            self._finish(row, "stop")
        elif len(row.tokens) == row.limit:
            self._finish(row, "length")

    @contextlib.contextmanager
    def _boundary(self, row: Row) -> Iterator[None]:
        """An error inside the block ends this row."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 # the boundary of one request; see the file
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        log.error("an error ended an answer of %s", row.model, exc_info=error)
        if not row.finished:
            explained = EngineError(
                f"an error in the engine ended the answer: {in_a_line(error)}",
                where=f"model {row.model}",
                fix="the traceback is in the log; other answers go on",
            )
            with self._boundary(row):
                self._finish(row, "error", explained)

    def _finish(self, row: Row, reason: FinishReason, error: FinetuneError | None = None) -> None:
        row.finished = True
        self._counters.cancelled += reason == "cancelled"
        self._counters.failed += reason == "error"
        text = "" if error is not None else row.text.end()
        if row.text.stop is not None and reason == "length":
            reason = "stop"
        row.listen(FinishedEvent(reason, len(row.request.ids), len(row.tokens), text, row.text.stop, error))


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _not_finite(row: Row) -> EngineError:
    return EngineError(
        f"the model {row.model!r} gave NaN or infinity where the next token's logits should be",
        where=f"after {len(row.request.ids)} tokens of the prompt and {len(row.tokens)} of the answer",
        fix="look for NaN in its weights; an adapter whose training loss became NaN has to be trained again",
    )
