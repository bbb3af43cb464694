"""Two processes train and evaluate as one does on the same global batch, sharded (FSDP2) or not.

By one launch over gloo on the CPU; `tests/gpu/test_multi_cuda.py` does it on two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import training_processes
from tests.conftest import REPOSITORY
from tests.running import run_finetune

pytestmark = pytest.mark.slow

# 30 rows in steps of eight: the last one has six. Nine held-out rows: on two processes of one row a batch, one is left.
TRAINING = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
NON_MOE = {"quantization": {"attention": "16bit"}, "trainable": {"method": "non_moe"}}
PROBE = {"router": {"probe_tokens": 64}}  # reads the base before the first step
CASES: dict[str, dict[str, Any]] = {
    "data-parallel": {"training": {"per_device_eval_batch_size": 8}},
    "packed": {"training": {"per_device_eval_batch_size": 2, "packing": True, "eval_packing": True}},
    "single-rows": {"training": {"per_device_eval_batch_size": 1}},
    "fsdp2-lora": {"model": {"dtype": "bfloat16"}, **PROBE},
    "fsdp2-non-moe-bf16": {"model": {"dtype": "bfloat16"}, **NON_MOE, **PROBE},
    "fsdp2-non-moe": {**NON_MOE, **PROBE, "training": {"save_strategy": "steps", "save_steps": 6}},
}


@pytest.fixture(scope="module")
def runs(
    small_mixtral: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Folders of a case's run in one process and in two."""
    root = tmp_path_factory.mktemp("processes")

    def write(case: str, processes: int) -> Path:
        recipe: dict[str, Any] = {
            "model": {"path": str(small_mixtral), "device": "cpu"},
            "data": {"train": str(conversations), "eval": str(conversations), "max_rows": 30, "max_eval_rows": 9},
            "training": {
                **TRAINING,
                "per_device_train_batch_size": 8 // processes,
                "learning_rate": 2e-3,
                "logging_steps": 1,
                "max_length": 64,
                "save_strategy": "no",
            },
            "router": {"figures": False, "probe_tokens": 0},
            "output": {"dir": str(root / f"{case}-{processes}")},
        }
        for section, values in CASES[case].items():
            recipe[section] = {**recipe.get(section, {}), **values}
        path = root / f"{case}.{processes}.json"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        return path

    done = subprocess.run(
        [sys.executable, training_processes.__file__, "2", *(str(write(case, 2)) for case in CASES)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]

    def both(case: str) -> tuple[Path, Path]:
        ran = run_finetune("train", write(case, 1))
        assert ran.status == 0, ran.stderr
        return root / f"{case}-1", root / f"{case}-2"

    return both


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs: Callable[[str], tuple[Path, Path]], case: str) -> None:
    one, two = runs(case)
    bf16 = "model" in CASES[case]
    # In bf16 sums of other shapes move an update a little, and after it the experts of some tokens.
    near = 2e-2 if bf16 else 1e-5
    for name, steps in (("loss", range(1, 7)), ("eval_loss", (0, 3, 6))):
        assert sorted(logged(one, name)) == list(steps)
        assert logged(two, name) == pytest.approx(logged(one, name), rel=near), name
    # Before weights have moved even bf16 says the same: the same products in the same dtype.
    for name, step, within in (("loss", 1, 1e-5), ("eval_loss", 0, 1e-5), ("grad_norm", 1, 2e-3 if bf16 else 1e-5)):
        assert logged(two, name)[step] == pytest.approx(logged(one, name)[step], rel=within), name
    for name in ("eval_router/tokens", "router/tokens", "num_tokens"):
        assert logged(two, name) == logged(one, name) != {}, name
    assert sorted(logged(two, "eval_mean_token_accuracy")) == [0, 3, 6]
    if not bf16:
        for name in ("eval_mean_token_accuracy", "eval_router/max_vio_worst", "router/max_vio_worst"):
            assert logged(two, name) == pytest.approx(logged(one, name), rel=near), name
    if case == "fsdp2-non-moe":  # what training goes on from, and no copy of the experts
        sizes = {path.name: path.stat().st_size for path in (two / "checkpoints" / "checkpoint-6").iterdir()}
        assert {"non_moe.safetensors", "optimizer.bin", "scheduler.pt", "trainer_state.json"} <= sizes.keys()
        assert sum(sizes.values()) - sizes["tokenizer.json"] < 3.1 * sizes["non_moe.safetensors"]
    if not bf16:
        files = [next(run.glob("adapter/*.safetensors")) for run in (one, two)]
        expected, found = (load_file(file) for file in files)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name
