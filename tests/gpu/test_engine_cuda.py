"""The engine on the device: as near to a float32 forward as the model's own bfloat16 forward is."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.adapter.adapter import Adapter, load
from finetune.infer.engine import Engine
from finetune.infer.request import Event, FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from finetune.moe.load import LoadedModel

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
# Root mean squares over some 200 tokens, in which a flipped routing weighs as much as all roundings together.
AT_MOST = 1.5


def answers(engine: Engine, requests: list[Request]) -> list[list[TokenEvent]]:
    """All at once, so that rows join and leave."""
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


def logprobs(loaded: LoadedModel, ids: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens after `ids`, by one forward pass, in float64 from the logits on."""
    model: Any = loaded.model
    given = torch.tensor([[*ids, *tokens[:-1]]], device=loaded.device)
    logits = model(given).logits[0, len(ids) - 1 :].double().cpu()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def errors(engine: Engine, truth: LoadedModel, request: Request, events: list[TokenEvent]) -> torch.Tensor:
    """[2, tokens]: the engine's and the bfloat16 forward's differences from the truth."""
    tokens = [event.token for event in events]
    exact = logprobs(truth, request.ids, tokens)
    forward = engine.run(lambda loaded: logprobs(loaded, request.ids, tokens), request.model)
    return torch.stack([torch.tensor([event.logprob for event in events]).double() - exact, forward - exact])


def require_near(found: list[torch.Tensor]) -> None:
    engine, forward = torch.cat(found, 1).square().mean(1).sqrt().tolist()
    print(f"root mean square error of log-probabilities: engine {engine:.4f}, bfloat16 forward {forward:.4f}")
    assert engine <= AT_MOST * forward, (engine, forward)


@torch.inference_mode()
def test_tokens_are_as_good_as_the_forwards() -> None:
    truth = load(str(MODEL), dtype="float32", device="cuda")
    with Engine.load(str(MODEL), device="cuda", settings=EngineSettings(max_batch=8, max_length=512)) as engine:
        texts = ["The capital of France is", "Once", "def f(x):", "1 2 3 4 5", "Hello " * 40, "Why", "A B", "x", "y z"]
        requests = [
            Request(engine.encode_text(text), Sampling(max_new_tokens=10 + 3 * number, logprobs=0, ignore_eos=True))
            for number, text in enumerate(texts)
        ]
        found = []
        for request, events in zip(requests, answers(engine, requests), strict=True):
            assert len(events) == request.sampling.max_new_tokens
            found.append(errors(engine, truth, request, events))
        require_near(found)
        seeded = Request(requests[0].ids, Sampling(max_new_tokens=20, temperature=1.0, seed=4))
        first, second = ([event.token for event in answers(engine, [seeded])[0]] for _ in range(2))
        assert first == second


@torch.inference_mode()
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
    truths = {
        "tuned": load(str(folder), dtype="float32", device="cuda"),
        "base": Adapter.open(folder).load_base(dtype="float32", device="cuda"),
    }
    with Engine.load(str(folder), device="cuda", settings=EngineSettings(max_batch=4)) as engine:
        sampling = Sampling(max_new_tokens=12, logprobs=0, ignore_eos=True)
        requests = [Request(tuple(range(3, 30)), sampling, name) for name in ("tuned", "base", "tuned", "base")]
        found = answers(engine, requests)
        require_near([errors(engine, truths[r.model or ""], r, e) for r, e in zip(requests, found, strict=True)])
        assert [event.token for event in found[0]] == [event.token for event in found[2]]
        assert [event.logprob for event in found[0]] != [event.logprob for event in found[1]]
