"""Two GPUs compute what one does on the same global batch: data parallel and FSDP2, LoRA and non-MoE, by the README's
launch line; what they save merges.

All runs go beside each other: the model is tiny, and most of their time is the host's. `scripts/test_gpu.sh` runs this
file as its part `multi`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = ("qlora-attention", "freeze-experts")
STRATEGIES = ("multi_gpu", "fsdp2")
# Nine held-out rows do not come out even on two processes; packed, 200 rows are far more than the steps take.
SETTINGS = {
    "model.device": "cuda",
    "data.max_rows": 200,
    "data.max_eval_rows": 9,
    "training.max_steps": 4,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-3,
    "training.logging_steps": 1,
    "training.eval_strategy": "steps",
    "training.eval_steps": 2,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "router.figures": "false",
}

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="comparing two GPUs with one needs two: this machine has fewer"
)


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def train(method: str, strategy: str, folder: Path) -> list[dict]:
    """Metrics of a run of global batch 4: of two processes, or of one where the strategy is `one`."""
    settings = {**SETTINGS, "output.dir": folder, "training.per_device_train_batch_size": 4 if strategy == "one" else 2}
    recipe = [f"recipes/tiny-mixtral/{method}.yaml"]
    recipe += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    if strategy == "one":
        run(["scripts/train.py", *recipe], CUDA_VISIBLE_DEVICES="0")
    else:
        launch = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{strategy}.yaml"]
        run([*launch, "--main_process_port", "0", "scripts/train.py", *recipe])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folder of each run, by method and strategy."""
    root = tmp_path_factory.mktemp("multi")
    folders = {(method, each): root / f"{method}-{each}" for method in METHODS for each in ("one", *STRATEGIES)}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: train(*item[0], item[1]), folders.items()))
    return folders


def metrics(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_one_process(runs: dict[tuple[str, str], Path], method: str, strategy: str) -> None:
    one, two = runs[method, "one"], runs[method, strategy]
    for name, steps in (("loss", [1, 2, 3, 4]), ("eval_loss", [0, 2, 4]), ("grad_norm", [1, 2, 3, 4])):
        expected, found = metrics(one, name), metrics(two, name)
        assert sorted(expected) == steps
        print(method, strategy, name, {step: found[step] / expected[step] - 1 for step in steps})
        # bf16 products of other shapes.
        assert found == pytest.approx(expected, rel=2e-2 if name == "grad_norm" else 2e-3), name
    assert metrics(two, "eval_loss")[4] < metrics(two, "eval_loss")[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_merges(runs: dict[tuple[str, str], Path], method: str, strategy: str, tmp_path: Path) -> None:
    adapter = runs[method, strategy] / "adapter"
    said = run(["-m", "finetune", "merge", str(adapter), "--output", str(tmp_path / "merged"), "--json"])
    assert json.loads(said)["fidelity"]["top_k_overlap"] > 0.97
