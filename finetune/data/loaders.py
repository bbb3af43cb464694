"""Rows to what a trainer iterates over: `DataLoader`s whose batches belong to this process alone.

Why: accelerate deals the batches of a sampler out to the processes and repeats rows from the beginning until they come
out even; and what transformers' length-grouped sampler takes depends on the global random state, which a resumed run
does not have. Here the batches (`batching.py`) know the processes and the epoch, and accelerate only moves them.

Leaves out streamed data and the settings that ask accelerate or transformers to deal out batches in their own way
(`dispatch_batches`, `split_batches`, `train_sampling_strategy: batch_rebalance`): those loaders stay upstream's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from finetune.data.batching import RowBatches, TokenBudgetBatches, grouped, in_order, row_lengths, shuffled
from finetune.private_api import train_batch_size, without_unused_columns


def training_batches(
    trainer: Any, *, budget: int | None = None, pad_to_multiple_of: int = 1
) -> RowBatches | TokenBudgetBatches | None:
    """This process's batches of a trainer's training data; None where upstream deals them out.

    Args:
        trainer: transformers', or one derived from it.
        budget: batches of so many padded tokens instead of so many rows.
    """
    args, rows = trainer.args, trainer.train_dataset
    share = {"process": trainer.accelerator.process_index, "processes": trainer.accelerator.num_processes}
    if budget is not None:
        lengths = row_lengths(rows)
        return TokenBudgetBatches(lengths, budget, seed=args.seed, pad_to_multiple_of=pad_to_multiple_of, **share)
    own = args.accelerator_config
    if own.split_batches or own.dispatch_batches or not isinstance(rows, Dataset):
        return None
    size, seed = train_batch_size(trainer), args.seed if args.data_seed is None else args.data_seed
    orders = {
        "random": lambda: shuffled(len(rows), seed),
        "sequential": lambda: in_order(len(rows)),
        "group_by_length": lambda: grouped(row_lengths(rows), size * args.gradient_accumulation_steps, seed),
    }
    if args.train_sampling_strategy not in orders:
        return None
    order = orders[args.train_sampling_strategy]()
    return RowBatches(order, len(rows), size, drop_last=args.dataloader_drop_last, **share)


def held_out_batches(trainer: Any, rows: Dataset) -> RowBatches:
    """This process's batches of held-out rows, every row once over all processes, in the order that pads least."""
    args = trainer.args
    by_length = args.train_sampling_strategy == "group_by_length"
    order = grouped(row_lengths(rows), args.eval_batch_size, args.seed) if by_length else in_order(len(rows))
    return RowBatches(
        order,
        len(rows),
        args.eval_batch_size,
        process=trainer.accelerator.process_index,
        processes=trainer.accelerator.num_processes,
    )


def own_loader(trainer: Any, rows: Dataset, batches: RowBatches | TokenBudgetBatches, description: str) -> DataLoader:
    """A loader of this process's batches, with the trainer's collator and worker settings."""
    args = trainer.args
    loader = DataLoader(
        without_unused_columns(trainer, rows, description),
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    return prepare_data_loader(
        loader,
        trainer.accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=trainer.accelerator.non_blocking,
    )
