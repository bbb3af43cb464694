"""A folder that is filled so that a kill at any moment costs one shard, and leaves nothing half-written.

It is filled under a hidden name beside the output (`.<name>.merge.partial`). A safetensors shard is made in memory,
saved under a name of its own and renamed when it is whole; then `done.json` notes the SHA-256 of each of its tensors.
The same merge, started again, keeps the shards whose tensors still have those hashes and makes the others; another
merge to the same output starts from nothing. Every shard is pushed to the disk and read back from it, hash by hash,
while the next ones are made. The index comes last, and then one rename gives the folder its name.

What is in memory is two shards, one being made and one being saved. Tensors are made two at a time, each by one thread:
torch's own threads wait for each other by spinning, which takes the cores from the rest (user time of a merge on 2 busy
cores: 137 s against 33 s).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets.utils import tqdm
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint import read_json
from finetune.disk import full_disk_explained, require_fresh, require_space, write_json
from finetune.errors import FinetuneError, OutputError
from finetune.moe import Tensors

DONE = "done.json"
_MAKERS, _AHEAD = 2, 2
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
T = TypeVar("T")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Item:
    """Tensors of one file that are made at once.

    size: their bytes.
    make: gives them by name; it runs beside another item's.
    """

    size: int
    make: Callable[[], Mapping[str, Tensor]]


class Partial:
    """The folder being filled; further small files may go into `folder`.

    done: name of what is whole -> what `hashes` gives for it.
    """

    def __init__(self, folder: Path, job: Any):
        self.folder, self._job = folder, job
        self.done: dict[str, Any] = {}
        with contextlib.suppress(FinetuneError):
            match read_json(folder / DONE):
                case {"job": found, "done": {**done}} if found == job:
                    self.done = {str(name): hashes for name, hashes in done.items()}

    def note(self, name: str, hashes: object) -> None:
        """Notes that something is whole."""
        self.done[name] = hashes
        write_json(self.folder / DONE, {"job": self._job, "done": self.done})

    def require_written(self, file: str, part: str, read: Callable[[], object]) -> None:
        """Pushes a file to the disk and compares a part of it with what was noted, read from there and not from memory.

        Raises:
            OutputError: the disk gives back other bytes than were written.
        """
        with (self.folder / file).open("rb") as stream:
            os.fsync(stream.fileno())
            if sys.platform == "linux":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if read() != self.done[part]:
            raise OutputError(
                "what was read back is not what was written",
                where=f"{self.folder / file}" + (f": {part}" if part != file else ""),
                fix="check the disk, and give the same command again: only what is damaged is made anew",
            )


@contextlib.contextmanager
def resumable(output: Path, job: Mapping[str, Any]) -> Iterator[Partial]:
    """A hidden folder that becomes `output` at the end; when the work is cut off it stays, to be resumed.

    Args:
        job: what identifies the work, as JSON; what another job left is thrown away.

    Raises:
        OutputError: `output` already holds something, another process is at it, or the disk is full.
    """
    require_fresh(output)
    folder = output.parent / f".{output.name}.merge.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be written: {error.strerror}",
            where=str(output.parent),
            fix="choose a folder that you may write to",
        ) from None
    with full_disk_explained(output), _locked(folder, output):
        partial = Partial(folder, json.loads(json.dumps(job)))
        for entry in folder.iterdir():
            if not partial.done or entry.name.startswith("."):  # what a kill left half-written
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield partial
        except FinetuneError as error:
            # What is left must be something that the same command can resume.
            if not partial.done or not isinstance(error, OutputError):
                shutil.rmtree(folder)
            raise
        (folder / DONE).unlink(missing_ok=True)
        os.replace(folder, output)


def write_shards(filled: Partial, items: Sequence[Item], limit: int, *, title: str) -> tuple[dict[str, int], int]:
    """Writes every tensor, and the index where they fill several files.

    Args:
        limit: the largest size of a file in bytes; more only where one item is larger.

    Returns the files' sizes by name, and how many bytes were made anew.

    Raises:
        OutputError: the disk is full, or gives back other bytes than were written.
    """
    shards = _shards(items, limit)
    count = len(shards)
    names = (
        [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else ["model.safetensors"]
    )
    folder = filled.folder

    def is_whole(name: str) -> bool:
        try:
            return name in filled.done and _hashes_in(folder / name) == filled.done[name]
        except FinetuneError:
            return False

    todo = [(name, shard) for name, shard in zip(names, shards, strict=True) if not is_whole(name)]
    anew = sum(item.size for _, shard in todo for item in shard)
    total = sum(item.size for item in items)
    require_space(folder, anew, what="the merged model")
    with (
        tqdm(total=total, initial=total - anew, unit="B", unit_scale=True, desc=title, delay=1) as bar,
        contextlib.closing(made_ahead([item for _, shard in todo for item in shard], _made_and_hashed)) as made,
        threads(1) as writer,
        threads(1) as reader,
    ):
        writing: Future[None] | None = None
        checks = []
        for name, shard in todo:
            tensors: dict[str, Tensor] = {}
            hashes: dict[str, str] = {}
            for item, (tensors_of, hashes_of) in islice(made, len(shard)):
                tensors |= tensors_of
                hashes |= hashes_of
                bar.update(item.size)
            if writing is not None:
                writing.result()
            writing = writer.submit(_save, filled, name, tensors, hashes)
            # In the writer's queue: once the file is there.
            read = functools.partial(_hashes_in, folder / name)
            checks.append(writer.submit(reader.submit, filled.require_written, name, name, read))
        if writing is not None:
            writing.result()
        for check in checks:
            check.result().result()
    if count > 1:
        weight_map = {tensor: name for name in names for tensor in filled.done[name]}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return {name: (folder / name).stat().st_size for name in names}, anew


def made_ahead(items: Sequence[T], make: Callable[[T], Made]) -> Generator[tuple[T, Made], None, None]:
    """Every item with what `make` gives for it, in order; a few are made before they are asked for."""
    threads_of_torch = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread and those that begin now
    waiting: deque[tuple[T, Future[Made]]] = deque()
    try:
        with threads(_MAKERS) as makers:
            for item in items:
                waiting.append((item, makers.submit(make, item)))
                if len(waiting) > _AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for item, future in waiting:
                yield item, future.result()
    finally:
        torch.set_num_threads(threads_of_torch)


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that begins nothing more once the block has ended."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def parse_size(text: str) -> int:
    """Bytes of a size like `4GB`, `500 MB` or `2GiB`.

    Raises:
        OutputError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 1 <= size < 2**63:
        raise OutputError(
            f"{text!r} is not a size",
            where="--shard-size",
            allowed="a number with KB, MB, GB, KiB, MiB or GiB",
            fix="give a size like 4GB",
        )
    return int(size)


def _shards(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Files filled in order."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def _save(filled: Partial, name: str, tensors: dict[str, Tensor], hashes: dict[str, str]) -> None:
    """Writes a shard, which has its name only once it is whole."""
    half = filled.folder / f".{name}"
    save_file(tensors, half, metadata={"format": "pt"})
    os.replace(half, filled.folder / name)
    filled.note(name, hashes)


def _made_and_hashed(item: Item) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {name: tensor.contiguous() for name, tensor in item.make().items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == item.size, list(tensors)
    return tensors, {name: _sha256(tensor) for name, tensor in tensors.items()}


def _hashes_in(file: Path) -> dict[str, str]:
    """SHA-256 of every tensor in a safetensors file.

    Raises:
        ModelError: the file is damaged.
    """
    tensors = Tensors([file])
    return {name: _sha256(tensors.read(name)) for name in tensors}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another merge is writing there", where=str(output), fix="wait for it, or choose another --output"
            ) from None
        yield
    finally:
        os.close(handle)
