"""One optimizer step of recipes through the trainer; `python auxiliary_run.py PROCESSES RECIPE...` in processes.

LoRA's B, which begins at zero, is drawn first, so that every gradient says something. The main process writes to
`<output.dir>/step.pt` what trained before the step and its gradient after the last micro-batch, and to
`<output.dir>/step.json` what was logged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune.console import Report
from finetune.recipe.load import load_recipe
from finetune.train.run import Prepared, prepare
from tests.processes import be_processes


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


if __name__ == "__main__":
    be_processes(lambda: [step(Path(recipe)) for recipe in sys.argv[2:]], int(sys.argv[1]))
