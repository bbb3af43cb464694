"""Readers of the hub's data sets, from the cache or as a stream.

Why: what the hub answers is not what a user can act on. How: `datasets` does the work; `ask` turns each of its
complaints into a `DataError`. A data set in the cache is memory-mapped, a streamed one is never kept. Leaves out named
configurations and loading scripts; what `datasets` says about them is passed on with the way around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from finetune.data.arrow import values_of
from finetune.data.reading import CHUNK_ROWS, Reader, SizeUnit, digest
from finetune.data.rows import RawChunk
from finetune.errors import DataError
from finetune.private_api import dataset_fingerprint


class DatasetReader(Reader):
    """A `datasets.Dataset`, memory-mapped from the cache."""

    def __init__(self, data: Dataset, *, name: str, split: str) -> None:
        self._data, self._split = data, split
        self.where, self.unit, self.name = f"{name}, split {split}", "row", f"{name}, split {split},"

    def size(self) -> tuple[int, SizeUnit]:
        return len(self._data), "rows"

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        first = 1
        for table in self._data.with_format("arrow").iter(CHUNK_ROWS):
            values = [value for batch in table.to_batches() for value in values_of(batch)]
            yield RawChunk(index, first, values=values), first + len(values) - 1
            first += len(values)

    def fingerprint(self) -> str:
        return digest("hub", dataset_fingerprint(self._data), self._split)

    def count(self) -> int:
        return len(self._data)


class StreamReader(Reader):
    """A data set as it comes over the network; its fingerprint is the hub's revision.

    `rows` is what the hub says that the split holds, 0 where it does not say.
    """

    def __init__(self, data: IterableDataset, *, name: str, split: str, rows: int, revision: str) -> None:
        self._data, self._split, self._rows, self._revision = data, split, rows, revision
        self.where, self.unit, self.name = f"{name}, split {split}", "row", f"{name}, split {split},"

    def size(self) -> tuple[int, SizeUnit]:
        return self._rows, "rows"

    def chunks(self, index: int) -> Iterator[tuple[RawChunk, int]]:
        rows, first = iter(self._data), 1
        while values := list(islice(rows, CHUNK_ROWS)):
            yield RawChunk(index, first, values=values), first + len(values) - 1
            first += len(values)

    def fingerprint(self) -> str:
        return digest("stream", self._revision, self._split)

    def count(self) -> int:
        return self._rows or super().count()


def open_hub(name: str, split: str) -> Reader:
    """A data set fetched into the cache; `split` may be a slice, or a sum of slices."""
    return DatasetReader(ask(name, split, lambda: load_dataset(name, split=split)), name=name, split=split)


def open_stream(name: str, split: str) -> Reader:
    """One whole split of a data set that is streamed."""
    builder = ask(name, split, lambda: load_dataset_builder(name))
    data = ask(name, split, lambda: load_dataset(name, split=split, streaming=True))
    known = builder.info.splits or {}
    rows = known[split].num_examples if split in known else 0
    return StreamReader(data, name=name, split=split, rows=rows, revision=builder.hash)


def split_names(name: str) -> list[str]:
    return ask(name, "", lambda: get_dataset_split_names(name))


def ask(name: str, split: str, question: Callable[[], Any]) -> Any:
    """The answer of `datasets`, or its complaint in our words.

    Raises:
        DataError: there is no such data set or split, it may not be read, or the hub does not answer.
    """
    try:
        return question()
    except DatasetNotFoundError as fault:
        raise DataError(
            f"the hub has no data set {name!r} that you may read",
            where=name,
            fix="check the name; for a gated or private data set run `hf auth login` first",
        ) from fault
    except ConnectionError as fault:
        raise DataError(
            f"{name!r} is neither a local file or folder nor a data set that the hub could be asked for: {fault}",
            where=name,
            fix="check the path, or connect to the network; a data set fetched once is read from the cache",
        ) from fault
    except ValueError as fault:
        if "Unknown split" in str(fault):
            raise unknown_split(split, split_names(name), where=name) from fault
        raise _unreadable(name, fault) from fault
    except (DatasetGenerationError, FileNotFoundError, RuntimeError) as fault:
        raise _unreadable(name, fault) from fault


def unknown_split(split: str, known: list[str], *, where: str) -> DataError:
    return DataError(
        f"there is no split {split!r}",
        where=where,
        allowed=", ".join(known) + ", or a slice of one as in train[:1000]",
        fix="name one of these in data.train_split or data.eval_split",
    )


def _unreadable(name: str, fault: Exception) -> DataError:
    reason = fault.__cause__ or fault
    return DataError(
        f"the data set cannot be read: {' '.join(str(reason).split())}",
        where=name,
        fix="download it with `hf download ID --repo-type dataset --local-dir DIR`, and name a file or folder of it",
    )
