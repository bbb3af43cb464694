"""The engine on the device: its graphs choose what the model's own forward over the same tokens finds best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.infer.engine import Engine
from finetune.infer.request import Event, FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.runner import EngineSettings

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
# In bfloat16 two kernels differ by a few roundings of logits around 10 (0.03 each). Measured: 0.09.
MARGIN = 0.25


def answers(engine: Engine, requests: list[Request]) -> list[list[TokenEvent]]:
    """All at once, so that rows join and leave."""
    import threading

    found: list[list[Event]] = [[] for _ in requests]
    done = [threading.Event() for _ in requests]
    for request, events, end in zip(requests, found, done, strict=True):

        def listen(event: Event, events: list[Event] = events, end: threading.Event = end) -> None:
            events.append(event)
            if isinstance(event, FinishedEvent):
                end.set()

        engine.submit(request, listen)
    assert all(end.wait(120) for end in done)
    return [[event for event in events if isinstance(event, TokenEvent)] for events in found]


def check(engine: Engine, request: Request, events: list[TokenEvent]) -> None:
    """Each token's logit is the best of a forward pass over what came before, or within the margin of it."""
    tokens = [event.token for event in events]

    def forward(loaded: Any) -> torch.Tensor:
        ids = torch.tensor([[*request.ids, *tokens[:-1]]], device=loaded.device)
        return loaded.model(ids).logits[0, len(request.ids) - 1 :].float().cpu()

    logits = engine.run(forward, request.model)
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(-1).values - chosen).max()) < MARGIN
    logprob = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logprob - torch.tensor([event.logprob for event in events])).abs().max()) < MARGIN


def test_tokens_are_the_forwards_best() -> None:
    with Engine.load(str(MODEL), device="cuda", settings=EngineSettings(max_batch=8, max_length=512)) as engine:
        texts = ["The capital of France is", "Once", "def f(x):", "1 2 3 4 5", "Hello " * 40, "Why", "A B", "x", "y z"]
        requests = [
            Request(engine.encode_text(text), Sampling(max_new_tokens=10 + 3 * number, logprobs=0, ignore_eos=True))
            for number, text in enumerate(texts)
        ]
        for request, events in zip(requests, answers(engine, requests), strict=True):
            assert len(events) == request.sampling.max_new_tokens
            check(engine, request, events)
        seeded = Request(requests[0].ids, Sampling(max_new_tokens=20, temperature=1.0, seed=4))
        first, second = ([event.token for event in answers(engine, [seeded])[0]] for _ in range(2))
        assert first == second


def test_adapters_beside_their_base(saved_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned" / "adapter"
    shutil.copytree(saved_adapter, folder)
    generator = torch.Generator().manual_seed(0)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, file)
    with Engine.load(str(folder), device="cuda", settings=EngineSettings(max_batch=4)) as engine:
        sampling = Sampling(max_new_tokens=12, logprobs=0, ignore_eos=True)
        requests = [Request(tuple(range(3, 30)), sampling, name) for name in ("tuned", "base", "tuned", "base")]
        found = answers(engine, requests)
        for request, events in zip(requests, found, strict=True):
            check(engine, request, events)
        assert [event.token for event in found[0]] == [event.token for event in found[2]]
        assert [event.logprob for event in found[0]] != [event.logprob for event in found[1]]
