"""The router's pictures: when they are sent, what is in them, and what is not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.router.media import RouterMedia, RouterMediaCallback, is_shown

LOADS = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]]


def vectors(prefix: str = "") -> dict[str, list[float]]:
    """As `RouterCallback.vectors`, last layer first, with vectors that are no load."""
    loads = {f"{prefix}router/layer_{layer:02d}/load": LOADS[layer] for layer in (2, 0, 1)}
    return {**loads, f"{prefix}router/by_layer/max_vio": [1.0, 0.0, 0.6], "router/drift/by_layer/kl": [0.0, 0.1, 0.2]}


class Trained:
    """A callback beside a trainer that only pretends, and what it sent."""

    def __init__(self, *, draws: bool = True, main: bool = True):
        self.sent: list[RouterMedia] = []
        self.drawn: list[tuple[torch.Tensor, str]] = []
        self.now: dict[str, list[float]] = {}
        self.callback = RouterMediaCallback(lambda: self.now, [self.sent.append], draw=self.draw if draws else None)
        self.main = main

    def draw(self, load_LE: torch.Tensor, title: str) -> np.ndarray:
        self.drawn.append((load_LE, title))
        return np.full((2, 3, 3), len(self.drawn), dtype=np.uint8)

    def log(self, step: int, now: dict[str, Any]) -> None:
        self.now = now
        state = TrainerState(global_step=step, is_world_process_zero=self.main)
        self.callback.on_log(TrainingArguments(report_to="none"), state, TrainerControl(), logs={})


def test_utilization_by_layer_and_its_names() -> None:
    trained = Trained()
    trained.log(10, vectors())
    trained.log(10, vectors("eval_"))
    training, held_out = trained.sent
    for media in (training, held_out):
        assert media.step == 10
        assert np.array_equal(media.utilization, [[4 * load for load in row] for row in LOADS])
    assert [title for _, title in trained.drawn] == ["Expert load, training, step 10", "Expert load, held-out, step 10"]
    assert torch.equal(trained.drawn[0][0], torch.tensor(LOADS, dtype=torch.float64))
    named = held_out.named(lambda values: ("histogram", values.shape), lambda pixels: ("image", int(pixels[0, 0, 0])))
    assert named == {"eval_router/utilization": ("histogram", (12,)), "eval_router/load_map": ("image", 2)}
    assert set(training.named(list, list)) == {"router/utilization", "router/load_map"}


def test_training_logs_are_shown_ever_more_rarely_and_evaluations_always() -> None:
    trained = Trained()
    for step in range(1, 301):
        trained.log(step, vectors())
        trained.log(step, {})  # a log without router metrics is not counted
        if step % 100 == 0:
            trained.log(step, vectors("eval_held_"))
    training = [media.step for media in trained.sent if media.prefix == ""]
    assert training == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert [media.step for media in trained.sent if media.prefix == "eval_held_"] == [100, 200, 300]
    assert sum(is_shown(log) for log in range(1, 10_001)) == 6 + 10_000 // 64


def test_no_figures_means_no_drawing() -> None:
    trained = Trained(draws=False)
    trained.log(1, vectors())
    (media,) = trained.sent
    assert media.image is None
    assert set(media.named(list, list)) == {"router/utilization"}


def test_only_the_main_process_sends() -> None:
    trained = Trained(main=False)
    trained.log(1, vectors())
    assert trained.sent == []
    assert trained.drawn == []


def test_loads_of_two_logs_at_once_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="loads of several logs at once"):
        Trained().log(1, {**vectors(), **vectors("eval_")})
