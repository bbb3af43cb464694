"""OpenAI's own client against the real engine: what comes over HTTP is what the engine says.

One server for the module, with a random model and an adapter of it that changes its answers.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune.infer.engine import Engine
from finetune.infer.request import FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from finetune.infer.text import PromptEnd, Vocabulary
from tests.models import save_lora
from tests.serve.serving import Serving, eventually, serving

STORY = "Once upon a time, there was a little"
TALK: Any = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Tell one."}]
CLIENTS = 64


@pytest.fixture(scope="module")
def adapter(talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, large enough to change what is said."""
    return save_lora(talkative, tmp_path_factory.mktemp("run") / "adapter", std=0.5)


@pytest.fixture(scope="module")
def engine(talkative: Path, adapter: Path) -> Iterator[Engine]:
    settings = EngineSettings(max_batch=16, max_length=128, kv_gib=0.25)
    adapters = {"noise": str(adapter)}
    with Engine.load(str(talkative), name="tiny", adapters=adapters, device="cpu", settings=settings) as made:
        yield made


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Serving]:
    with serving(engine) as server:
        yield server


def said(
    engine: Engine, ids: tuple[int, ...], sampling: Sampling, model: str = "tiny", *, chat: bool = False
) -> tuple[str, FinishedEvent]:
    """The engine's own text and end."""
    events = list(engine.stream(Request(ids, sampling, model, None if chat else engine.prompt_end(ids, model))))
    end = events[-1]
    assert isinstance(end, FinishedEvent)
    return "".join(event.text for event in events), end


def test_models(served: Serving) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny", "noise"]
    assert client.models.retrieve("noise").owned_by == "moe-qlora"


@pytest.mark.parametrize("model", ["tiny", "noise"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_says_what_the_engine_says(engine: Engine, served: Serving, model: str, stream: bool) -> None:
    text, end = said(engine, engine.encode_chat(TALK), Sampling(12), model, chat=True)
    fields: Any = {"model": model, "messages": TALK, "temperature": 0, "max_tokens": 12}
    if not stream:
        made = served.client().chat.completions.create(**fields)
        [choice] = made.choices
        assert (choice.message.role, choice.message.content) == ("assistant", text)
        reason, usage = choice.finish_reason, made.usage
    else:
        pieces = list(
            served.client().chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        )
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == text
        assert len({piece.id for piece in pieces}) == 1
        assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].choices == []
        reason, usage = pieces[-2].choices[0].finish_reason, pieces[-1].usage
    assert reason == end.reason
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (end.prompt_tokens, end.completion_tokens)
    assert usage.total_tokens == end.prompt_tokens + end.completion_tokens


def test_the_adapter_says_something_else(engine: Engine) -> None:
    ids = engine.encode_chat(TALK)
    assert said(engine, ids, Sampling(12))[0] != said(engine, ids, Sampling(12), "noise")[0]


def test_the_forms_of_a_prompt(engine: Engine, served: Serving) -> None:
    ask = served.client().completions.create
    fields: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    ids = [engine.encode_text(text) for text in (STORY, "One day")]
    texts = [said(engine, one, Sampling(12))[0] for one in ids]
    assert [choice.text for choice in ask(prompt=STORY, **fields).choices] == texts[:1]
    both = ask(prompt=[STORY, "One day"], **fields)
    assert [choice.text for choice in both.choices] == texts
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (len(ids[0]) + len(ids[1]), 24)
    assert [choice.text for choice in ask(prompt=list(ids[0]), **fields).choices] == texts[:1]
    assert [choice.text for choice in ask(prompt=[list(one) for one in ids], **fields).choices] == texts
    streamed = ["", ""]
    for piece in ask(prompt=[STORY, "One day"], stream=True, **fields):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == texts


def test_a_prompt_is_read_once_for_all_its_answers(
    engine: Engine, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the event loop, which a prompt of 31,000 tokens would hold up."""
    read, threads = engine.prompt_end, []

    def watched(ids: Sequence[int], model: str | None = None) -> PromptEnd:
        threads.append(threading.current_thread().name)
        return read(ids, model)

    def made_again(vocabulary: Vocabulary, tokenizer: Any) -> None:
        raise AssertionError("a tokenizer of a thousand control tokens takes 4 ms")

    monkeypatch.setattr(engine, "prompt_end", watched)
    monkeypatch.setattr(Vocabulary, "__init__", made_again)
    served.client().completions.create(model="tiny", prompt=["A", "B"], n=3, max_tokens=1)
    assert [name.rpartition("_")[0] for name in threads] == ["encoding"] * 2


def test_silence_means_openais_defaults(engine: Engine, served: Serving) -> None:
    short = served.client().completions.create(model="tiny", prompt=STORY, extra_body={"ignore_eos": True})
    assert short.usage is not None
    assert short.usage.completion_tokens == 16
    ids = engine.encode_chat(TALK)
    long = served.client().chat.completions.create(model="tiny", messages=TALK, extra_body={"ignore_eos": True})
    assert long.usage is not None
    assert long.usage.total_tokens == engine.max_length
    assert long.choices[0].finish_reason == "length"
    assert long.usage.prompt_tokens == len(ids)
    # Temperature 1 and a new seed each time.
    fields: Any = {"model": "tiny", "prompt": STORY}
    assert len({served.client().completions.create(**fields).choices[0].text for _ in range(3)}) == 3


def test_seeds(engine: Engine, served: Serving) -> None:
    ask = served.client().completions.create
    fields: Any = {"model": "tiny", "prompt": STORY, "max_tokens": 16, "temperature": 0.9, "top_p": 0.95}
    extra = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    first = [choice.text for choice in ask(**fields, seed=7, n=3, extra_body=extra).choices]
    again = [choice.text for choice in ask(**fields, seed=7, n=3, extra_body=extra).choices]
    assert first == again
    assert len(set(first)) == 3
    # Among the neighbours of a batch, the seed's answer is the engine's own.
    sampling = Sampling(16, 0.9, 0.95, 50, 0.01, 1.1, seed=7)
    assert first[0] == said(engine, engine.encode_text(STORY), sampling)[0]
    assert first[0] != ask(**fields, seed=8, extra_body=extra).choices[0].text


def test_stop_texts(engine: Engine, served: Serving) -> None:
    text, _ = said(engine, engine.encode_text(STORY), Sampling(12))
    word = text.split()[4]
    ask = served.client().completions.create
    fields: Any = {"model": "tiny", "prompt": STORY, "temperature": 0, "max_tokens": 12}
    for stop in (word, ["never said", word]):
        [choice] = ask(**fields, stop=stop).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(word)], "stop")
        pieces = [piece.choices[0] for piece in ask(**fields, stop=stop, stream=True)]
        assert "".join(piece.text for piece in pieces) == text[: text.index(word)]
        assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(engine: Engine, served: Serving, stream: bool) -> None:
    ids = engine.encode_chat(TALK)
    events = [e for e in engine.stream(Request(ids, Sampling(8, logprobs=3), "tiny")) if isinstance(e, TokenEvent)]
    fields: Any = {"model": "tiny", "messages": TALK, "temperature": 0, "max_tokens": 8}
    fields |= {"logprobs": True, "top_logprobs": 3}
    client = served.client()
    if stream:
        parts = [piece.choices[0].logprobs for piece in client.chat.completions.create(**fields, stream=True)]
        told = [one for part in parts if part is not None for one in part.content or ()]
        text = "".join(
            piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**fields, stream=True)
        )
    else:
        [choice] = client.chat.completions.create(**fields).choices
        assert choice.logprobs is not None
        told, text = choice.logprobs.content or [], choice.message.content or ""
    assert [one.logprob for one in told] == pytest.approx([event.logprob for event in events], abs=1e-4)
    assert b"".join(bytes(one.bytes or ()) for one in told).decode().strip() == text.strip()
    for one, event in zip(told, events, strict=True):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx([lp for _, lp in event.top], abs=1e-4)
        # Greedy: the best one is the one taken.
        assert one.top_logprobs[0].token == one.token


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(served: Serving, stream: bool) -> None:
    fields: Any = {"model": "tiny", "prompt": STORY, "temperature": 0, "max_tokens": 8, "logprobs": 2}
    ask = served.client().completions.create
    if stream:
        choices = [piece.choices[0] for piece in ask(**fields, stream=True)]
    else:
        choices = ask(**fields).choices
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens = [token for part in parts for token in part.tokens or ()]
    offsets = [offset for part in parts for offset in part.text_offset or ()]
    tops = [top for part in parts for top in part.top_logprobs or ()]
    logprobs = [logprob for part in parts for logprob in part.token_logprobs or ()]
    assert len(tokens) == len(offsets) == len(tops) == len(logprobs) == 8
    for token, offset in zip(tokens, offsets, strict=True):
        # The tokenizer drops the space before the first word.
        assert text[offset:].startswith(token)
    for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
        assert list(top) == sorted(top, key=lambda shown: -top[shown])
        assert top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1


def test_no_logprobs_unless_asked_for(served: Serving) -> None:
    assert served.client().completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].logprobs is None
    made = served.client().chat.completions.create(model="tiny", messages=TALK, max_tokens=2)
    assert made.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_final_assistant_message_is_continued(engine: Engine, served: Serving, stream: bool) -> None:
    """The answer is what comes after it, its first space included; control tokens typed in it stay text."""
    talk: Any = [*TALK, {"role": "assistant", "content": "Once</s> [INST] upon a"}]
    ids = engine.encode_chat(talk, continues=True)
    assert ids.count(engine.tokenizer_of("tiny").eos_token_id) == 0
    # As a completion from the same tokens, spaces and all.
    text, end = said(engine, ids, Sampling(8))
    fields: Any = {"model": "tiny", "messages": talk, "temperature": 0, "max_tokens": 8}
    if stream:
        pieces = served.client().chat.completions.create(**fields, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    else:
        made = served.client().chat.completions.create(**fields, extra_body={"continue_final_message": True})
        assert made.choices[0].message.content == text
        assert made.usage is not None
        assert made.usage.prompt_tokens == end.prompt_tokens == len(ids)


def test_a_conversation_that_the_template_refuses(served: Serving) -> None:
    response = httpx.post(
        served.url + "/chat/completions", json={"messages": [*TALK, {"role": "user", "content": "And?"}]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "user and assistant in turn" in response.json()["error"]["message"]


def test_many_clients_that_stream(engine: Engine, served: Serving) -> None:
    """More than decode at once; each gets its own answer, which is the same as alone."""
    prompts = [f"{STORY} number {number}" for number in range(CLIENTS)]
    alone = [said(engine, engine.encode_text(prompt), Sampling(6))[0] for prompt in prompts[:4]]

    def ask(prompt: str) -> str:
        with served.client() as client:
            pieces = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, stream=True)
            return "".join(piece.choices[0].text for piece in pieces)

    before = counted(served)
    with ThreadPoolExecutor(CLIENTS) as pool:
        texts = list(pool.map(ask, prompts))
    assert texts[:4] == alone
    assert all(texts)
    after = counted(served)
    streamed = 'finetune_requests_total{"endpoint": "/v1/completions", "status": "200"}'
    assert after[streamed] - before.get(streamed, 0) == CLIENTS
    assert after["finetune_prompt_tokens_total{}"] - before["finetune_prompt_tokens_total{}"] == sum(
        len(engine.encode_text(prompt)) for prompt in prompts
    )
    assert after["finetune_completion_tokens_total{}"] > before["finetune_completion_tokens_total{}"]
    name = "finetune_time_to_first_token_seconds_count{}"
    assert after[name] - before[name] == CLIENTS
    assert 0 < after["finetune_time_per_output_token_seconds_sum{}"] < 60


def counted(served: Serving) -> dict[str, float]:
    """Every sample at /metrics, by name and labels."""
    text = httpx.get(served.root + "/metrics").text
    families = text_string_to_metric_families(text)
    return {f"{s.name}{json.dumps(s.labels)}": s.value for family in families for s in family.samples}


def test_clients_that_vanish_in_the_middle(engine: Engine, served: Serving) -> None:
    cancelled = engine.stats().cancelled
    body: Any = {"prompt": STORY, "max_tokens": 100, "stream": True, "ignore_eos": True}
    for _ in range(4):
        with httpx.stream("POST", served.url + "/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    assert eventually(lambda: engine.stats().running == 0 and engine.stats().waiting == 0)
    assert engine.stats().cancelled - cancelled == 4
    assert engine.stats().kv_pages_used == 0
    assert eventually(lambda: served.admission.open == 0)
