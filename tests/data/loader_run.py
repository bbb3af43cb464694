"""A training run that remembers the rows it saw; `python loader_run.py OUT PROCESSES KIND...` makes runs in processes.

Each process writes what it saw to OUT/KIND-RANK.json: the rows of every batch, in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from finetune.data.batching import held_out_batches, own_loader, training_batches
from tests.processes import be_processes

BUDGET, ROWS, SAVED_AT = 64, 75, 3
LENGTHS = np.random.default_rng(0).integers(1, 30, ROWS)


class Model(torch.nn.Module):
    """Learns nothing, and remembers the first token of each row, which is the row's number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(input_ids[:, 0].tolist())
        torch.rand(len(input_ids))  # as dropout would; nothing that is seen may depend on it
        return {"loss": (self.weight * labels.float()).sum()}


class OwnTrainer(Trainer):
    """A plain trainer with the loaders of ours."""

    budget: int | None = None

    def get_train_dataloader(self) -> DataLoader:
        batches = training_batches(self, budget=self.budget)
        assert batches is not None
        return own_loader(self, self.train_dataset, batches, "training")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [-1] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def run(out: Path, kind: str, epochs: int, accumulation: int, *, checkpoint: Path | None = None) -> None:
    """Trains on batches of a token budget, or of four rows in the order of a `train_sampling_strategy`."""
    rows = Dataset.from_dict({"input_ids": [[number] * int(length) for number, length in enumerate(LENGTHS)]})
    model = Model()
    args = TrainingArguments(
        output_dir=str(out / kind),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="random" if kind == "budget" else kind,
        save_strategy="steps",
        save_steps=SAVED_AT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
    )
    trainer: Any = OwnTrainer(model, args, data_collator=collate, train_dataset=rows)
    trainer.budget = BUDGET if kind == "budget" else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    held_out = held_out_batches(trainer, rows)
    document = {
        "seen": model.seen,
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "per_epoch": len(trainer.get_train_dataloader()),
        "held_out": list(held_out)[: held_out.own],
    }
    (out / f"{kind}-{trainer.accelerator.process_index}.json").write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    be_processes(lambda: [run(Path(sys.argv[1]), kind, 2, 2) for kind in sys.argv[3:]], int(sys.argv[2]))
