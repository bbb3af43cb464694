"""Rows that decode together: a fault ends its own row, and a row that made room says what it would have said."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import EngineError
from finetune.infer.engine import RESTARTS, Engine
from finetune.infer.pages import page_bytes
from finetune.infer.request import Event, FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from finetune.infer.runner import Row
from finetune.infer.sampler import RowSampling
from finetune.infer.text import AnswerText
from finetune.moe.arch import MoeArch
from finetune.moe.load import read_config
from tests.models import save_lora
from tests.running import refused

IDS = tuple(range(3, 20))


@pytest.fixture(scope="module")
def broken_adapter(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with NaN in its weights, as a run leaves it whose loss became NaN."""
    # In every B: torch's attention on a CPU loses NaN that only some keys have.
    return save_lora(small_mixtral, tmp_path_factory.mktemp("broken") / "adapter", std=float("nan"))


def engine_with(path: Path, pages: int | None = None, **settings: Any) -> Engine:
    """An engine whose pool has so many pages."""
    if pages is not None:
        size = page_bytes(MoeArch.from_config(read_config(str(path))), torch.float32)
        settings["kv_gib"] = (pages + 1) * size / 2**30
    engine = Engine.load(str(path), device="cpu", settings=EngineSettings(**settings))
    assert pages in (None, engine.stats().kv_pages)
    return engine


@pytest.fixture(scope="module")
def engine(saved_adapter: Path, broken_adapter: Path) -> Iterator[Engine]:
    settings = EngineSettings(max_batch=4, max_length=256)
    adapters = {"broken": str(broken_adapter)}
    with Engine.load(str(saved_adapter), adapters=adapters, device="cpu", settings=settings) as made:
        yield made


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    """The events of requests that are submitted at once."""
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in requests]
    for request, events in zip(requests, queues, strict=True):
        engine.submit(request, events.put)
    found: list[list[Event]] = []
    for events in queues:
        found.append([events.get(timeout=60)])
        while not isinstance(found[-1][-1], FinishedEvent):
            found[-1].append(events.get(timeout=60))
    return found


def tokens(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenEvent)]


def pages_used(engine: Engine) -> int:
    """Once nothing runs; they are given back after the last event."""
    deadline = time.monotonic() + 30
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.002)
    return engine.stats().kv_pages_used


def error_of(events: Sequence[Event]) -> str | None:
    end = events[-1]
    assert isinstance(end, FinishedEvent)
    assert (end.reason == "error") == (end.error is not None)
    assert end.error is None or isinstance(end.error, EngineError)
    return None if end.error is None else str(end.error)


SOUND = [Request(IDS[:n], Sampling(20, temperature, seed=n), "base") for n, temperature in ((4, 0.0), (9, 1.0))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_of_nan_ends_its_own_requests(engine: Engine, temperature: float) -> None:
    alone = [tokens(answers(engine, [request])[0]) for request in SOUND]
    broken = Request(IDS, Sampling(20, temperature, logprobs=2), "broken")
    first, bad, second, worse = answers(engine, [SOUND[0], broken, SOUND[1], broken])
    for events in (bad, worse):
        said = error_of(events)
        assert said is not None
        assert "the model 'broken' gave NaN or infinity" in said
        assert "trained again" in said
        assert tokens(events) == []
    assert [tokens(first), tokens(second)] == alone
    assert error_of(first) is error_of(second) is None
    assert engine.failure is None


@pytest.mark.parametrize("more", [(), ("--temperature", 1)])
def test_generate_says_so_and_does_not_succeed(broken_adapter: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    ran = refused(
        tmp_path,
        *("generate", broken_adapter, "--raw", "--prompt", "Hi", "--device", "cpu", *more),
        says=("gave NaN or infinity", "where: after ", "fix: look for NaN"),
    )
    assert ran.stdout == ""
    assert ran.stderr.count("error: ") == 1


def test_what_raises_for_one_request_ends_that_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its text, in its random numbers (of a prompt's pass and of a step's), and in its listener."""
    alone = [tokens(answers(engine, [request])[0]) for request in SOUND]
    draw, add = RowSampling.draw, AnswerText.add

    def raising_draw(row: RowSampling) -> float:
        if row.sampling.seed == 13 and row._next >= row.sampling.top_k:
            raise RuntimeError("thirteen")
        return draw(row)

    def raising_add(text: AnswerText, token: int) -> str:
        if text._stops == ("poison",):
            raise UnicodeError("half a character")
        return add(text, token)

    monkeypatch.setattr(RowSampling, "draw", raising_draw)
    monkeypatch.setattr(AnswerText, "add", raising_add)
    at_once, later = (Request(IDS, Sampling(20, 1.0, top_k=k, seed=13), "base") for k in (0, 3))
    text = Request(IDS, Sampling(20, stop=("poison",)), "base")
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        raise ValueError("a listener's own fault")

    engine.submit(Request(IDS, Sampling(20), "base"), listen)
    found = answers(engine, [SOUND[0], at_once, SOUND[1], later, text, *SOUND])
    assert [tokens(found[n]) for n in (0, 2, 5, 6)] == alone * 2
    assert [error_of(found[n]) for n in (0, 2, 5, 6)] == [None] * 4
    assert "RuntimeError: thirteen" in str(error_of(found[1]))
    assert "RuntimeError: thirteen" in str(error_of(found[3]))
    assert len(tokens(found[3])) == 2  # the third was on its way
    assert "UnicodeError: half a character" in str(error_of(found[4]))
    assert len(heard) == 2  # a token and the end, which it did not want to hear either
    assert engine.failure is None
    assert engine.restarts == 0
    assert pages_used(engine) == 0


def test_a_prompt_that_runs_out_of_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = engine._runner.prefill

    def limited(rows: list[Row]) -> Any:
        if max(row.length for row in rows) > 100:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB\nand more lines")
        return prefill(rows)

    alone = [tokens(answers(engine, [request])[0]) for request in SOUND]
    monkeypatch.setattr(engine._runner, "prefill", limited)
    long = Request(IDS * 7, Sampling(4), "base")
    first, bad, second = answers(engine, [SOUND[0], long, SOUND[1]])
    assert [tokens(first), tokens(second)] == alone
    assert "OutOfMemoryError: tried to allocate 80 GiB\n" in str(error_of(bad))


def test_a_fault_of_nobody_ends_what_runs_and_the_engine_goes_on(
    small_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_with(small_mixtral, max_batch=2, max_length=64) as engine:
        admit, faults = engine._batch._admit, [RuntimeError("a bug")]

        def failing() -> None:
            admit()
            if faults:
                raise faults.pop()

        monkeypatch.setattr(engine._batch, "_admit", failing)
        found = answers(engine, [Request(IDS, Sampling(4))] * 3)
        assert "the engine failed while it answered: RuntimeError: a bug" in str(error_of(found[0]))
        assert (engine.restarts, engine.failure) == (1, None)
        assert error_of(answers(engine, [Request(IDS, Sampling(4))])[0]) is None
        assert pages_used(engine) == 0
        # One that comes again and again, with no token between, is no way to go on.
        for number in range(RESTARTS):
            faults.append(RuntimeError("always"))
            assert error_of(answers(engine, [Request(IDS, Sampling(4))])[0]) is not None
            assert (engine.failure is None) == (number < RESTARTS - 1)
        for asked in (lambda: engine.submit(Request(IDS), print), lambda: engine.run(print)):
            with pytest.raises(EngineError, match=r"RuntimeError: always\n  where: .*\n  fix: start it again"):
                asked()


def test_a_device_that_answers_nothing_ends_the_engine(small_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with engine_with(small_mixtral, max_batch=2, max_length=64) as engine:
        monkeypatch.setattr(engine._runner, "step", lost)
        monkeypatch.setattr(engine._runner, "probe", lost)
        found = answers(engine, [Request(IDS, Sampling(4))] * 3)
        assert all("illegal memory access" in str(error_of(events)) for events in found)
        assert "illegal memory access" in str(engine.failure)


@pytest.mark.slow  # greedy rows that made room: test_rotary.py
def test_a_row_that_made_room_says_what_it_would_have_said(small_mixtral: Path) -> None:
    """Three requests of two pages in a pool of three; greedy and drawn, one by a repetition penalty.

    Of twenty tokens each: a prompt computed anew rounds otherwise than steps, and among 32,000 that hardly differ a
    draw would meet the difference.
    """
    requests = [
        Request(
            IDS[: 2 + n],
            Sampling(150 + 10 * n, temperature, top_k=20, repetition_penalty=penalty, seed=n, ignore_eos=True),
        )
        for n, (temperature, penalty) in enumerate([(0.0, 1.0), (1.0, 1.3), (1.0, 1.0)])
    ]
    with engine_with(small_mixtral, max_batch=3, max_length=192) as engine:
        expected = [tokens(events) for events in answers(engine, requests)]
        assert engine.stats().preempted == 0
    with engine_with(small_mixtral, pages=5, max_batch=3, max_length=192) as engine:
        found = answers(engine, requests)
        used, stats = pages_used(engine), engine.stats()
    assert [tokens(events) for events in found] == expected
    assert [error_of(events) for events in found] == [None] * 3
    assert stats.preempted > 0
    assert (used, stats.prompt_tokens) == (0, sum(len(request.ids) for request in requests))
    assert stats.completion_tokens == sum(map(len, expected))


def test_requests_without_a_limit_run_together(small_mixtral: Path) -> None:
    """Sixteen that may fill the whole context, where the pool holds one and a half of it."""
    requests = [Request((1, 40 + n), Sampling(2**63)) for n in range(16)]
    with engine_with(small_mixtral, pages=24, max_batch=16, max_length=512) as engine:
        most = 0
        ends: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def listen(event: Event) -> None:
            nonlocal most
            most = max(most, engine.stats().running)
            if isinstance(event, FinishedEvent):
                ends.put(event)

        handles = [engine.submit(request, listen) for request in requests]
        while most < 16 and engine.failure is None:
            time.sleep(0.002)
        for handle in handles:
            handle.cancel()
        assert len([ends.get(timeout=60) for _ in requests]) == 16
    assert most == 16
