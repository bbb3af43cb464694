"""Two runs with one seed give identical losses for 20 steps, whatever the plan keeps: two full-width Mixtral layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from finetune.bench.measure import Recorder
from finetune.bench.workload import make_workload
from finetune.console import Report
from finetune.train.run import prepare, run_steps

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 20


def losses(scratch: Path, shape: Path, *overrides: str) -> list[float]:
    scratch.mkdir()
    workload = make_workload(
        REPOSITORY / "recipes" / "mixtral-8x7b" / "qlora-attention-80gb.yaml",
        [f"model.path={shape}", *overrides],
        scratch=scratch,
        batch=2,
        length=1024,
        steps=STEPS,
        random_weights=True,
    )
    ready = prepare(workload.recipe, Report(as_json=True), random_weights=True)
    recorder = Recorder()
    recorder.attach(ready.trainer.model)
    run_steps(ready, workload.recipe)
    recorder.detach()
    found = [float(loss) for loss in recorder.losses][:STEPS]
    del ready
    torch.cuda.empty_cache()
    return found


def test_losses(tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shutil.copytree(REPOSITORY / "recipes" / "mixtral-8x7b" / "shape", shape)
    config = json.loads((shape / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    first = losses(tmp_path / "first", shape)
    assert len(set(first)) == STEPS
    assert losses(tmp_path / "second", shape) == first
    assert losses(tmp_path / "full", shape, "training.gradient_checkpointing=full") == first
