"""Rows to packed rows or to batches, how much of them is real tokens, and the loaders that a trainer iterates over.

Why: rows of 46 tokens beside one of 2,000 are mostly padding; accelerate repeats rows until the processes come out
even; and transformers' length-grouped order depends on the global random state. How: packing fills rows of `max_length`
by TRL's best-fit-decreasing, whole examples only; batches of a token budget have as many rows of about one length as
fit. An epoch's rows and their order follow from the seed and the epoch alone, so that a resumed run takes what was
left, and each row comes once over all processes. Leaves out the collator, streamed data, and settings that ask upstream
to deal out batches in its own way (`dispatch_batches`, `split_batches`, `batch_rebalance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from finetune.errors import DataError
from finetune.private_api import train_batch_size, without_unused_columns

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]

# Packed rows that are filled from one pool of examples: the last of them is half empty, so fewer would cost a share.
_POOL = 400
_SAMPLE = 1000
_BUCKETS_PER_OCTAVE = 8


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, from Arrow's own lists: 7 ms for 20,000 rows of 450 tokens."""
    batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(2000)
    found = [batch.column("input_ids").combine_chunks().value_lengths().to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *found])


def pack(rows: Dataset, max_length: int, *, strategy: PackingStrategy = "bfd") -> Dataset:
    """Rows of at most `max_length` tokens, made of whole examples; a column `seq_lengths` says where they end.

    TRL's packing takes 1,000 examples at a time, which fill 11 rows of 4096 tokens when they have 46 each, and leave 6%
    empty. Here as many are taken as fill 400.
    """
    from trl import pack_dataset  # brings torch

    if not len(rows):  # TRL's packing of none has not even the columns that it asks for
        return rows
    sample = row_lengths(rows.select(range(0, len(rows), max(len(rows) // _SAMPLE, 1))))
    mean = max(sample.sum() / max(len(sample), 1), 1)
    examples = max(math.ceil(_POOL * max_length / mean), 1000)
    return pack_dataset(rows, max_length, strategy, {"batch_size": examples, "desc": "Packing"})


def packing_efficiency(lengths: Sequence[int] | np.ndarray, max_length: int) -> float:
    """Share of real tokens when rows of such lengths are packed, by packing."""
    lengths_N = np.asarray(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    ids = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int8))
    packed = pack(Dataset(pa.table({"input_ids": ids})), max_length)
    return float(np.minimum(lengths_N, max_length).sum() / (len(packed) * max_length))


def padding_efficiency(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    grouped: bool = False,
    accumulation: int = 1,
    budget: int | None = None,
    seed: int = 0,
) -> float:
    """Share of real tokens in an epoch of padded batches, by drawing one.

    Args:
        batch_size: rows of a batch, where there is no budget.
        grouped: transformers' batches of similar lengths, which it makes for so many `accumulation` steps together.
        budget: batches of `TokenBudgetBatches` instead.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if budget is not None:
        padded = sum(
            len(rows) * int(lengths_N[rows].max()) for rows in TokenBudgetBatches(lengths_N, budget, seed=seed)
        )
    else:
        if grouped:
            order_N = _grouped_order(lengths_N, batch_size * accumulation, seed)
        else:
            order_N = np.random.default_rng(seed).permutation(len(lengths_N))
        batches = np.split(lengths_N[order_N], range(batch_size, len(order_N), batch_size))
        padded = sum(len(batch) * int(batch.max(initial=0)) for batch in batches)
    return float(lengths_N.sum() / max(padded, 1))


def _grouped_order(lengths_N: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    return np.array(get_length_grouped_indices(lengths_N.tolist(), batch_size, generator=generator))


Order = Callable[[int], np.ndarray]  # of an epoch: row numbers


def in_order(rows: int) -> Order:
    """As they stand in the data."""
    return lambda epoch: np.arange(rows)


def shuffled(rows: int, seed: int) -> Order:
    """The permutations that accelerate's seedable sampler draws."""
    import torch

    return lambda epoch: torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).numpy()


def grouped(lengths_N: np.ndarray, size: int, seed: int) -> Order:
    """transformers' order of similar lengths, for `size` rows at a time."""
    return lambda epoch: _grouped_order(lengths_N, size, seed + epoch)


class _Share:
    """One process's share of an epoch's batches; the order follows from the epoch, which the trainer sets."""

    def __init__(self, process: int, processes: int) -> None:
        assert 0 <= process < processes, "a process that is not one of them"
        self._process, self._processes, self.epoch = process, processes, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the same epoch always has the same."""
        self.epoch = epoch


class RowBatches(_Share):
    """Batches of so many row numbers, for one of several processes: a `batch_sampler`.

    Every row comes once an epoch. Of the last step's rows each process gets as many as any other, or one more; where
    there are fewer of them than processes, the step before gives some. A process that is left without a row all the
    same, which takes batches of one row, repeats one.

    Args:
        order: the row numbers of an epoch; the same in every process.
        rows, batch_size: of the data, and of a process's batch.
        process, processes: this one's number, and how many share the rows.
        drop_last: leave out the rows that do not fill a batch of every process.

    Attributes:
        repeated: rows that some process sees again at the end of an epoch.
        own: how many of this process's batches, the first ones, are of rows that no other process sees.
    """

    def __init__(
        self,
        order: Order,
        rows: int,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(process, processes)
        self._order = order
        step = batch_size * processes
        self._counts = [step] * (rows // step)  # rows of each step, of all processes
        left = 0 if drop_last else rows % step
        if left:
            self._counts.append(left)
            if left < processes and rows > step and batch_size > 1:
                self._counts[-2:] = [step - (processes - left), processes]
        last = self._counts[-1] if self._counts else processes
        self.repeated = max(processes - last, 0)
        self.own = len(self._counts) - (process >= last)

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return len(self._counts)

    def __iter__(self) -> Iterator[list[int]]:
        row_N = self._order(self.epoch)
        begin = 0
        for count in self._counts:
            share = np.array_split(row_N[begin : begin + count], self._processes)[self._process]
            yield share.tolist() or [int(row_N[self._process % len(row_N)])]
            begin += count


class TokenBudgetBatches(_Share):
    """Batches of row numbers whose padded size, rows times longest row, is at most a budget: a `batch_sampler`.

    Every row comes once an epoch. Rows are sorted into buckets of lengths within 9% of each other; an epoch shuffles
    the rows of a bucket, and the batches. A batch is measured by its longest bucket, so that its number of rows, and
    with it the number of batches, is the same in every epoch: the trainer counts its steps once. Each process gets as
    many batches as any other; where they do not come out even, batches are halved, and where they are single rows then,
    the shortest rows are repeated.

    Args:
        lengths: tokens of each row.
        budget: padded tokens of a batch.
        seed: with the epoch, what the order depends on; the same in every process.
        process, processes: this one's number, and how many share the batches.
        pad_to_multiple_of: as the collator's.

    Attributes:
        repeated: rows that some process sees again at the end of an epoch.

    Raises:
        DataError: a row is longer than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        budget: int,
        *,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        pad_to_multiple_of: int = 1,
    ) -> None:
        super().__init__(process, processes)
        self._seed = seed
        lengths_N = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
        padded_N = -(-lengths_N // pad_to_multiple_of) * pad_to_multiple_of
        longest = int(padded_N.max(initial=0))
        if longest > budget:
            raise DataError(
                f"a batch of {budget} tokens cannot hold the longest row, which has {longest}",
                where="data.tokens_per_batch",
                allowed=f"{longest} or more",
                fix="raise data.tokens_per_batch, or lower training.max_length",
            )
        self._bucket_N = np.floor(np.log2(padded_N) * _BUCKETS_PER_OCTAVE + 1e-9).astype(np.int64)
        size_B = np.zeros(int(self._bucket_N.max(initial=0)) + 1, dtype=np.int64)
        np.maximum.at(size_B, self._bucket_N, padded_N)
        long_first = size_B[np.sort(self._bucket_N)[::-1]].tolist()  # each row by its bucket, as rows are batched
        self._counts = _even(_cut(long_first, budget), processes)
        self.repeated = -len(self._counts) % processes

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return (len(self._counts) + self.repeated) // self._processes

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self._seed, self.epoch])
        row_N = np.lexsort((draw.permutation(len(self._bucket_N)), -self._bucket_N))
        batches = np.split(row_N, np.cumsum(self._counts)[:-1]) if self._counts else []
        batches += [row_N[-1 - i % len(row_N) :][:1] for i in range(self.repeated)]
        order = draw.permutation(len(batches))
        for number in order[self._process :: self._processes]:
            yield batches[number].tolist()


def _cut(sizes: list[int], budget: int) -> list[int]:
    """Rows of each batch, when rows are taken in order, long ones first, until another would pass the budget."""
    counts, begin = [], 0
    while begin < len(sizes):
        count = min(budget // sizes[begin], len(sizes) - begin)
        counts.append(count)
        begin += count
    return counts


def _even(counts: list[int], processes: int) -> list[int]:
    """Halves batches, those of most rows first, until each process has as many or every batch is a single row."""
    counts = list(counts)
    while len(counts) % processes:
        largest = int(np.argmax(counts))
        if counts[largest] == 1:
            break
        half = counts[largest] // 2
        counts[largest : largest + 1] = [counts[largest] - half, half]
    return counts


# ---- the loaders of a trainer ---------------------------------------------------------------------------------------


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
