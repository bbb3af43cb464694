"""A training run on batches of a token budget; `python budget_run.py OUT PROCESSES` makes it in several processes.

Each process writes what it saw to OUT/seen-RANK.json: the rows of every batch, in order.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from finetune.trainer import token_budget_loader

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
        return {"loss": (self.weight * labels.float()).sum()}


class BudgetTrainer(Trainer):
    """A plain trainer with the loader of ours."""

    def get_train_dataloader(self) -> DataLoader:
        return token_budget_loader(self, BUDGET)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [-1] * (longest - len(row["input_ids"])) for row in rows])
    assert ids.numel() <= BUDGET
    return {"input_ids": ids, "labels": ids.clone()}


def main(out: Path, epochs: int, accumulation: int, *, checkpoint: Path | None = None) -> None:
    rows = Dataset.from_dict({"input_ids": [[number] * int(length) for number, length in enumerate(LENGTHS)]})
    model = Model()
    args = TrainingArguments(
        output_dir=str(out / "run"),
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=SAVED_AT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
    )
    trainer: Any = BudgetTrainer(model, args, data_collator=collate, train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    document = {
        "seen": model.seen,
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "per_epoch": len(trainer.get_train_dataloader()),
    }
    rank = trainer.accelerator.process_index
    (out / f"seen-{rank}.json").write_text(json.dumps(document), encoding="utf-8")


def _be(rank: int, processes: int, port: int, out: Path) -> None:
    """One of several processes, with the environment that torchrun gives it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    main(out, epochs=2, accumulation=2)


def _start(out: Path, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # what is imported comes along
    started = [context.Process(target=_be, args=(rank, processes, port, out), daemon=True) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    sys.exit(max(1 if process.exitcode is None else abs(process.exitcode) for process in started))


if __name__ == "__main__":
    _start(Path(sys.argv[1]), int(sys.argv[2]))
