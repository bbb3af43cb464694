"""What a run will write, from its settings: the number of checkpoints is counted here by walking through the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from finetune.arch import MoeArch
from finetune.checkpoint import read_json
from finetune.memory import estimate
from finetune.preflight import disk_bytes
from tests.conftest import REPOSITORY

ROWS, BATCH = 100, 8  # 13 steps an epoch
WEIGHTS = 13_631_488 * 4  # LoRA of rank 16 on Mixtral 8x7B, float32


@pytest.mark.parametrize(
    ("training", "saved_at"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": 12}, [5, 10, 12]),
        ({"save_strategy": "steps", "save_steps": 500, "max_steps": 12}, [12]),
        ({"save_strategy": "steps", "save_steps": 0.25, "num_train_epochs": 2}, [7, 14, 21, 26]),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, [13, 26, 39]),
        ({"save_strategy": "epoch", "num_train_epochs": 1.5}, [13, 20]),
        ({"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "save_total_limit": 2}, [1, 2, 3]),
        ({"save_strategy": "epoch", "num_train_epochs": 1, "save_total_limit": 2}, [13]),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 4, "max_steps": 12}, [4, 8, 12]),
        ({"save_strategy": "steps", "save_steps": 6, "max_steps": 12, "save_only_model": True}, [6, 12]),
    ],
)
def test_disk_is_counted_by_checkpoint(tmp_path: Path, training: dict[str, Any], saved_at: list[int]) -> None:
    arch = MoeArch.from_config(read_json(REPOSITORY / "recipes" / "mixtral-8x7b" / "shape" / "config.json"))
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        metric_for_best_model="loss",
        **training,
    )
    # AdamW keeps two more numbers a weight.
    checkpoint = WEIGHTS if training.get("save_only_model") else 3 * WEIGHTS
    needed = disk_bytes(estimate(arch), args, ROWS)
    beside = needed - len(saved_at) * checkpoint - WEIGHTS
    # Tokenizer and small files of each checkpoint and of the adapter; Mixtral's are 3.6 MB.
    assert 3.6e6 < beside / (len(saved_at) + 1) < 2e7
