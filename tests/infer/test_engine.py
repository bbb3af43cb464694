"""The engine: the tokens of transformers' own generate, whoever else is in the batch; limits, stops, cancelling."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from finetune.errors import AdapterError, DataError, DeviceError
from finetune.infer.engine import Engine
from finetune.infer.loading import default_name
from finetune.infer.request import FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from tests.models import save_lora

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(str(MODEL), device="cpu", settings=EngineSettings(max_batch=4, max_length=256)) as made:
        yield made


def tokens(engine: Engine, request: Request) -> list[int]:
    return [event.token for event in engine.stream(request) if isinstance(event, TokenEvent)]


def generated(engine: Engine, ids: tuple[int, ...], count: int, model: str | None = None) -> list[int]:
    """The same by transformers."""

    def greedy(loaded: Any) -> list[int]:
        out = loaded.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    return engine.run(greedy, model)


def test_greedy_tokens_of_requests_that_come_and_go_are_generates(engine: Engine) -> None:
    """Seven requests in four rows, so that they join and leave in between."""
    questions = ["What is the capital of France?", "Hi", "Write a poem", "1 + 1 =", "Why?", "Tell me a story", "List"]
    requests = [
        Request(engine.encode_chat([{"role": "user", "content": text}]), Sampling(max_new_tokens=6 + 5 * number))
        for number, text in enumerate(questions)
    ]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = tokens(engine, requests[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, request in enumerate(requests):
        assert found[number] == generated(engine, request.ids, request.sampling.max_new_tokens), questions[number]
    stats = engine.stats()
    assert stats.completion_tokens >= sum(len(row) for row in found.values())


def test_pipeline_runs_on_the_model_unchanged(engine: Engine) -> None:
    text = "The capital of France"

    def ask(loaded: Any) -> str:
        generator: Any = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
        return generator(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]

    events = list(engine.stream(Request(engine.encode_text(text), Sampling(max_new_tokens=8))))
    assert "".join(event.text for event in events).strip() == engine.run(ask).strip()


def test_sampling_is_of_the_seed_alone(engine: Engine) -> None:
    ids = engine.encode_text("Once upon a time")
    request = Request(ids, Sampling(max_new_tokens=12, temperature=1.0, seed=11))
    alone = tokens(engine, request)
    others = [engine.submit(Request(ids[:n], Sampling(max_new_tokens=20, temperature=1.0, seed=n)), lambda _: None)
              for n in (2, 3)]  # fmt: skip
    assert tokens(engine, request) == alone
    for other in others:
        other.cancel()
    assert tokens(engine, Request(ids, Sampling(max_new_tokens=12, temperature=1.0, seed=12))) != alone


def test_events_of_one_request(engine: Engine) -> None:
    ids = engine.encode_text("The capital of France is")
    *found, last = list(engine.stream(Request(ids, Sampling(max_new_tokens=5, logprobs=2))))
    assert isinstance(last, FinishedEvent)
    assert (last.reason, last.prompt_tokens, last.completion_tokens) == ("length", len(ids), 5)
    for event in found:
        assert isinstance(event, TokenEvent)
        assert event.top[0] == (event.token, event.logprob)
        assert len(event.top) == 2
        assert event.top[1][1] <= event.top[0][1] <= 0
    logits = engine.run(lambda loaded: loaded.model(torch.tensor([ids])).logits[0, -1].float())
    assert found[0].logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_a_stop_text_ends_and_does_not_show(engine: Engine) -> None:
    ids = engine.encode_text("The capital of France is")
    whole = "".join(event.text for event in engine.stream(Request(ids, Sampling(max_new_tokens=12))))
    stop = whole[len(whole) // 2 :][:4]
    events = list(engine.stream(Request(ids, Sampling(max_new_tokens=12, stop=(stop,)))))
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    last = events[-1]
    assert isinstance(last, FinishedEvent)
    assert (last.reason, last.stop) == ("stop", stop)


def test_the_end_of_sequence_ends(engine: Engine) -> None:
    ids = engine.encode_text("The capital of France is")
    second = tokens(engine, Request(ids, Sampling(max_new_tokens=2)))[1]
    config = engine._end_ids
    engine._end_ids = dict.fromkeys(engine.names, frozenset({second}))
    try:
        events = list(engine.stream(Request(ids, Sampling(max_new_tokens=9))))
        ignored = tokens(engine, Request(ids, Sampling(max_new_tokens=9, ignore_eos=True)))
    finally:
        engine._end_ids = config
    last = events[-1]
    assert isinstance(last, FinishedEvent)
    assert (last.reason, last.completion_tokens) == ("stop", 2)
    assert len(ignored) == 9


def test_room_ends_an_answer_and_a_prompt_without_room_is_refused(engine: Engine) -> None:
    ids = (1,) + (450,) * 249
    assert engine.max_length == 256
    last = list(engine.stream(Request(ids, Sampling(max_new_tokens=50, ignore_eos=True))))[-1]
    assert isinstance(last, FinishedEvent)
    assert (last.reason, last.completion_tokens) == ("length", 6)
    with pytest.raises(DataError, match="the prompt has 256 tokens") as caught:
        engine.submit(Request((1,) * 256), print)
    assert "fewer than 256" in str(caught.value)
    with pytest.raises(DataError, match="the prompt is empty"):
        engine.submit(Request(()), print)
    with pytest.raises(DataError, match="unknown token ids"):
        engine.submit(Request((1, 40000)), print)
    with pytest.raises(DataError, match="there is no model 'tuned'") as caught:
        engine.submit(Request((1,), model="tuned"), print)
    assert f"allowed: {engine.names[0]}" in str(caught.value)


def test_cancelling_gives_the_pages_back(engine: Engine) -> None:
    events: list[Any] = []
    begun, ended = threading.Event(), threading.Event()

    def listen(event: Any) -> None:
        events.append(event)
        (ended if isinstance(event, FinishedEvent) else begun).set()

    handle = engine.submit(Request((1, 450), Sampling(max_new_tokens=250, ignore_eos=True)), listen)
    assert begun.wait(30)
    handle.cancel()
    assert ended.wait(30)
    assert events[-1].reason == "cancelled"
    assert len(events) < 250
    stream = engine.stream(Request((1, 450), Sampling(max_new_tokens=250, ignore_eos=True)))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 30
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().kv_pages_used == 0


def test_a_function_of_the_caller_may_fail(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda loaded: 1 / 0)
    assert tokens(engine, Request((1, 450), Sampling(max_new_tokens=2)))


def test_an_adapter_and_its_base(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    tuned_adapter = save_lora(small_mixtral, tmp_path / "tuned" / "adapter", std=1.0)
    with Engine.load(str(tuned_adapter), adapters={"untrained": str(saved_adapter)}, device="cpu") as engine:
        assert engine.names == ("tuned", "base", "untrained")
        ids = tuple(range(3, 20))
        sampling = Sampling(max_new_tokens=8)
        found = {name: tokens(engine, Request(ids, sampling, name)) for name in engine.names}
        for name, row in found.items():
            assert row == generated(engine, ids, 8, name)
        assert found["untrained"] == found["base"] != found["tuned"]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(ids), print)
    with pytest.raises(AdapterError, match="cannot be called 'base'"):
        Engine.load(str(saved_adapter), adapters={"base": str(saved_adapter)}, device="cpu")
    with pytest.raises(AdapterError, match="no LoRA adapter in the folder"):
        Engine.load(str(saved_adapter), adapters={"x": str(tmp_path)}, device="cpu")
    with pytest.raises(AdapterError, match="trained on another base"):
        Engine.load(str(MODEL), adapters={"x": str(saved_adapter)}, device="cpu")
    assert default_name(str(saved_adapter.parent / "adapter")) == saved_adapter.parent.name.replace(".", "_")


def test_closing_finishes_or_cancels_what_runs() -> None:
    for drain, reason in ((True, "length"), (False, "cancelled")):
        engine = Engine.load(str(MODEL), device="cpu", settings=EngineSettings(max_batch=1, max_length=64))
        last: list[Any] = []
        for _ in range(2):
            engine.submit(Request((1, 450), Sampling(max_new_tokens=30, ignore_eos=True)), last.append)
        engine.close(drain=drain)
        assert [event.reason for event in last if isinstance(event, FinishedEvent)] == [reason] * 2


def test_no_memory_for_a_cache() -> None:
    with pytest.raises(DeviceError, match="no memory for keys and values") as caught:
        Engine.load(str(MODEL), device="cpu", settings=EngineSettings(kv_gib=1e-6))
    assert "--kv-gib" in str(caught.value)
    assert "allowed: 0.001 GiB or more" in str(caught.value)
