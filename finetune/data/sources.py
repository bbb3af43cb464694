"""From what a recipe names (a file, a folder or a hub id, and a split) to a reader of its rows.

Why: most runs that fail, fail here: a path that is not there, a split of another name, a hub that does not answer. How:
every such mistake is a `DataError` that says what is there instead; so is a source without a single row. Our own
readers read files and folders, split by the rules of `datasets` (`train-00000.parquet`, `validation/part.jsonl`); a
data set of the hub goes through `datasets`, and `ask` puts its complaints into our words. A data set in the cache is
memory-mapped, a streamed one is never kept. Leaves out named configurations of a hub data set and loading scripts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from datasets import (
    Dataset,
    IterableDataset,
    ReadInstruction,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pydantic import Field

from finetune.checkpoint import read_json
from finetune.data.fileformats import ONLY_SPLIT, SUFFIXES, Arrow, open_file, suffix_of
from finetune.data.reading import (
    CHUNK_ROWS,
    Joined,
    Reader,
    SizeUnit,
    Sliced,
    as_written,
    digest,
    row_count,
    rows_of,
    sample_row,
    values_of,
)
from finetune.data.rows import RawChunk
from finetune.errors import DataError
from finetune.private_api import dataset_fingerprint
from finetune.values import FileSchema, check_object

__all__ = ["Reader", "Source", "open_source", "rows_of", "sample_row"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        path: a data file, a folder of them or one made by `save_to_disk`, or a hub id.
        split: a split, a slice of one as in `train[:1000]` or `train[10%:]`, or a sum of such.
        max_rows: only the first so many rows of the split.
        streaming: a hub data set is read over the network as it is needed, and is not kept. Files always are read so.
    """

    path: str
    split: str = "train"
    max_rows: int | None = None
    streaming: bool = False


def open_source(source: Source) -> Reader:
    """The reader of a source.

    Raises:
        DataError: the source or the split is not there, cannot be read, or holds no rows.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        files = _open_single(path)
        reader = _of_split(source.split, list(files), files.__getitem__, where=str(path))
    elif (path / "dataset_dict.json").is_file():
        known = _saved(path / "dataset_dict.json", _SavedSplits).splits
        reader = _of_split(source.split, known, lambda name: _open_saved(path / name), where=str(path))
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        reader = _of_split(source.split, [ONLY_SPLIT], lambda _: _open_saved(path), where=str(path))
    elif path.is_dir():
        splits = _splits_of(path, source.split)
        reader = _of_split(source.split, list(splits), lambda name: _open_files(path, splits[name]), where=str(path))
    elif _is_hub_id(source.path):
        reader = _open_hub(source)
    else:
        raise _missing(path)
    if source.max_rows is not None:
        reader = Sliced(reader, 0, source.max_rows)
    if not any(row_count(chunk) for chunk, _ in reader.chunks(0)):
        raise DataError(
            f"split {source.split!r} of the data set holds no rows",
            where=reader.where,
            fix="name a source and a split that hold conversations",
        )
    return reader


# ---- splits and slices ----------------------------------------------------------------------------------------------


def _of_split(spec: str, known: list[str], open_split: Callable[[str], Reader], *, where: str) -> Reader:
    """The part of the splits that a spec such as `train[10%:]` or `train+test[:5]` names, as `datasets` reads it."""
    names = [re.split(r"[\[(]", part)[0].strip() for part in spec.split("+")]
    for name in names:
        if name not in known:
            raise unknown_split(name, known, where=where)
    if spec == names[0]:
        return open_split(spec)
    parts = [_sliced(open_split(name), name, part.strip()) for name, part in zip(names, spec.split("+"), strict=True)]
    return parts[0] if len(parts) == 1 else Joined(parts, where=f"{where}, split {spec}", name=parts[0].name)


def _sliced(reader: Reader, name: str, spec: str) -> Reader:
    counted = not re.search(r"\[\d*:\d+\]$", spec)  # a slice between two row numbers needs no count of the whole
    try:
        (part,) = ReadInstruction.from_spec(spec).to_absolute({name: reader.count() if counted else _ENDLESS})
    except ValueError as fault:
        raise DataError(
            f"split {spec!r} is not understood: {fault}",
            where=reader.where,
            allowed="a split, or a slice of one as in train[:1000] or train[10%:]",
            fix="correct the slice",
        ) from fault
    return Sliced(reader, part.from_, part.to)


_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "config.json", "metadata.json"}


def _splits_of(folder: Path, spec: str) -> dict[str, list[Path]]:
    """Files of a folder by split, sorted; all of them are `train` where no name has a split in it."""
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and suffix_of(path) in SUFFIXES and path.name not in _NO_ROWS and path.stat().st_size
    )
    files = [path for path in files if not any(part.startswith((".", "__")) for part in path.parts)]
    if not files:
        raise DataError(
            "the folder holds no data files",
            where=str(folder),
            allowed=f"files that end in {', '.join(SUFFIXES)}",
            fix="name a folder with data files, or one file",
        )
    splits: dict[str, list[Path]] = {}
    for path in files:
        if shard := _SHARD.fullmatch(path.as_posix()):
            splits.setdefault(shard[1], []).append(path)
    splits = splits or _named(files, lambda path: path.parent.as_posix()) or _named(files, lambda path: path.name)
    for name in (re.split(r"[\[(]", part)[0].strip() for part in spec.split("+")):
        own = [path for path in files if name in _words(path.as_posix()) or name == path.name.split(".")[0]]
        if name not in splits and own:  # beyond `datasets`: any word that the files themselves carry
            splits[name] = own
    return splits or {ONLY_SPLIT: files}


def _named(files: list[Path], text: Callable[[Path], str]) -> dict[str, list[Path]]:
    found = {split: [f for f in files if words & _words(text(f))] for split, words in _SPLIT_WORDS.items()}
    return {split: chosen for split, chosen in found.items() if chosen}


def _words(text: str) -> set[str]:
    return set(re.split(r"[-._ 0-9/]+", text))


# ---- files and folders ----------------------------------------------------------------------------------------------


def _open_single(path: Path) -> dict[str, Reader]:
    """The file's splits; all of it is one where it does not name any."""
    if path.stat().st_size == 0 and suffix_of(path) in SUFFIXES:
        raise DataError("the data file is empty", where=str(path), fix="name a file that holds conversations")
    return {**open_file(path, name=path.name).splits()}


def _open_files(folder: Path, files: list[Path]) -> Reader:
    readers = [open_file(folder / path, name=path.as_posix()) for path in files]
    return readers[0] if len(readers) == 1 else Joined(readers, where=str(folder), name=folder.name)


class _SavedSplits(FileSchema):
    """`dataset_dict.json`"""

    splits: Annotated[list[str], Field(min_length=1)]


class _SavedFile(FileSchema):
    filename: Annotated[str, Field(min_length=1, max_length=255)]


class _SavedState(FileSchema):
    """`state.json`"""

    data_files: Annotated[list[_SavedFile], Field(min_length=1, alias="_data_files")]


S = TypeVar("S", bound=FileSchema)


def _saved(file: Path, schema: type[S]) -> S:
    content = read_json(file, kind=DataError)
    return check_object(
        content, schema, kind=DataError, name=file.name, where=str(file.parent), fix="copy the folder again"
    )


def _open_saved(folder: Path) -> Reader:
    """A folder that `Dataset.save_to_disk` wrote."""
    paths = [folder / file.filename for file in _saved(folder / "state.json", _SavedState).data_files]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise DataError(f"there is no file {missing.name!r}", where=str(folder), fix="copy the folder again")
    readers = [Arrow(path, name=path.relative_to(folder.parent).as_posix()) for path in paths]
    return Joined(readers, where=str(folder), name=folder.name)


def _open_hub(source: Source) -> Reader:
    if not source.streaming:
        return open_hub(source.path, source.split)
    known = split_names(source.path)
    return _of_split(source.split, known, lambda name: open_stream(source.path, name), where=source.path)


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and suffix_of(Path(source)) not in SUFFIXES and source[0] != "."


# ---- faults of the source itself ------------------------------------------------------------------------------------


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"there is no folder {str(folder)!r}", where=str(path), fix="check the path in the recipe")
    files = sorted(file.name for file in folder.iterdir() if suffix_of(file) in SUFFIXES or file.is_dir())
    near = difflib.get_close_matches(path.name, files, n=3) or files[:5]
    return DataError(
        f"there is no data file {path.name!r} in {str(folder)!r}",
        where=str(path),
        allowed=f"what is there: {', '.join(near)}" if near else None,
        fix="check the path in the recipe; one that starts with ./ is relative to the recipe's folder",
    )


# ---- data sets of the hub -------------------------------------------------------------------------------------------


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
        rows, first = map(as_written, self._data), 1  # `datasets` fills nulls in as Arrow does
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
