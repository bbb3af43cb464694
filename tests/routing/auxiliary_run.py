"""One optimizer step of recipes through the trainer; `python auxiliary_run.py PROCESSES RECIPE...` in processes.

LoRA's B, which begins at zero, is drawn first, so that every gradient says something. The main process writes to
`<output.dir>/step.pt` what trained before the step and its gradient after the last micro-batch, and to
`<output.dir>/step.json` what was logged.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune.console import Report
from finetune.recipe import load_recipe
from finetune.train import Prepared, prepare


class KeepGradients(TrainerCallback):
    """The gradients just before the optimizer's step, and the logs."""

    def __init__(self, model: Any):
        self.model, self.gradients, self.logs = model, {}, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


def ready_to_step(path: Path) -> tuple[Prepared, KeepGradients]:
    """A prepared run whose LoRA updates are not zero."""
    ready = prepare(load_recipe(path), Report(as_json=True))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in ready.trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    kept = KeepGradients(ready.trainer.model)
    ready.trainer.add_callback(kept)
    return ready, kept


def step(path: Path) -> dict[str, torch.Tensor]:
    """The gradients of a recipe's one step."""
    ready, kept = ready_to_step(path)
    before = {n: p.detach().clone() for n, p in ready.trainer.model.named_parameters() if p.requires_grad}
    ready.trainer.train()
    if ready.trainer.is_world_process_zero():
        torch.save({"before": before, "gradients": kept.gradients}, ready.run.root / "step.pt")
        (ready.run.root / "step.json").write_text(json.dumps(kept.logs[0]))
    return kept.gradients


def _be(rank: int, processes: int, port: int, recipes: list[str]) -> None:
    """One of several processes, with the environment that torchrun gives it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    for recipe in recipes:
        step(Path(recipe))


def _start(processes: int, recipes: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # what is imported comes along
    started = [context.Process(target=_be, args=(rank, processes, port, recipes)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    sys.exit(max(1 if process.exitcode is None else abs(process.exitcode) for process in started))


if __name__ == "__main__":
    _start(int(sys.argv[1]), sys.argv[2:])
