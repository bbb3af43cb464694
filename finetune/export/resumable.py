"""Files of known size, written part by part so that a kill at any moment costs one part.

The folder is filled under a hidden name beside the output (`.<name>.merge.partial`). Every part that has been written
is noted in a journal with the SHA-256 of its bytes; the same merge, started again, reads those parts back, keeps the
ones whose bytes are the noted ones, and makes the others. Another merge to the same output starts from nothing. A file
whose parts are all there is pushed to the disk and read back from it, hash by hash, while the next file is being made.
At the end one rename gives the folder its name.

Making, writing and reading back run at once: torch, hashing and the system's calls let each other run. Parts are made
two at a time, each by one thread: torch's own threads wait for each other by spinning, which takes the cores from the
rest (user time of a merge on 2 busy cores: 137 s against 33 s). What was written goes to the disk by and by and is let
go of (page_cache.py), so a file's end has little to wait for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from datasets.utils import tqdm

from finetune.checkpoint import NotJson, parse_json
from finetune.errors import FinetuneError, OutputError
from finetune.export import buffers
from finetune.export.page_cache import BLOCK, flush, read_into, write_from
from finetune.runfolder import full_disk_explained, require_fresh, require_space

JOURNAL = "journal.jsonl"
# Parts that are being made, wait for the disk or go to it: what they take is the merge's memory.
_IN_FLIGHT = 4
_MAKERS = 2
# Reading back the last file is waited for: a disk and the hash in turn, so two at once.
_READERS = 2


@dataclass(frozen=True)
class Place:
    """Where `size` bytes go."""

    file: str
    start: int
    size: int


@dataclass(frozen=True)
class Part:
    """What is made at once: `make` gives the bytes of every place, uint8 each; it runs beside another part's."""

    places: tuple[Place, ...]
    make: Callable[[], Sequence[np.ndarray]]

    @property
    def key(self) -> str:
        """Names the part in the journal."""
        return f"{self.places[0].file}:{self.places[0].start}"

    @property
    def size(self) -> int:
        return sum(place.size for place in self.places)


@dataclass(frozen=True)
class OutputFile:
    """A file to fill: its first bytes, and its whole size."""

    header: bytes
    size: int


class Partial:
    """The folder being filled; `folder` takes further small files."""

    def __init__(self, folder: Path, journal: IO[str], done: dict[str, list[str]]):
        self.folder = folder
        self._journal = journal
        self._done = done

    def write(self, files: Mapping[str, OutputFile], parts: Sequence[Part], *, title: str) -> int:
        """Makes and writes every part that is not there yet, and reads every file back; returns the bytes made anew.

        Raises:
            OutputError: the disk is full or has no room, or gives back other bytes than were written.
        """
        for name, file in files.items():
            self._allocate(name, file)
        there = [self._is_there(part) for part in parts]
        todo = [part for part, is_there in zip(parts, there, strict=True) if not is_there]
        require_space(self.folder, sum(part.size for part in todo), what="the merged model")
        left = Counter(place.file for part in todo for place in part.places)
        by_file = {name: [part for part in parts if part.places[0].file == name] for name in files}
        bar = tqdm(total=sum(p.size for p in parts), unit="B", unit_scale=True, desc=title, delay=1)
        bar.update(bar.total - sum(part.size for part in todo))
        pools = makers, writer, readers = [ThreadPoolExecutor(threads) for threads in (_MAKERS, 1, _READERS)]
        writing: deque[tuple[int, Future[None]]] = deque()
        finishing: list[Future[list[Future[None]]]] = []

        def written() -> None:
            size, put = writing.popleft()
            put.result()
            bar.update(size)

        with bar, _one_thread_an_operator(), makers, writer, readers:
            try:
                for part in todo:
                    writing.append((part.size, writer.submit(self._put, part, makers.submit(part.make))))
                    if len(writing) > _IN_FLIGHT:
                        written()
                    left.subtract(place.file for place in part.places)
                    name = part.places[0].file
                    if not left[name]:
                        # In the writer's queue: after the file's last part.
                        finishing.append(writer.submit(self._finish, name, by_file[name], readers))
                while writing:
                    written()
                for finished in finishing:
                    for verified in finished.result():
                        verified.result()
            except BaseException:
                for pool in pools:
                    pool.shutdown(cancel_futures=True)
                raise
            finally:
                buffers.release()
        return sum(part.size for part in todo)

    def _allocate(self, name: str, file: OutputFile) -> None:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != file.size:
            with path.open("wb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)

    def _is_there(self, part: Part) -> bool:
        noted = self._done.get(part.key)
        return noted is not None and self._hashes(part) == noted

    def _put(self, part: Part, made: Future[Sequence[np.ndarray]]) -> None:
        hashes = []
        for place, array in zip(part.places, made.result(), strict=True):
            assert array.nbytes == place.size, (place, array.nbytes)
            view = array.data.cast("B")
            with (self.folder / place.file).open("r+b", buffering=0) as stream:
                write_from(stream, place.start, view)
            hashes.append(hashlib.sha256(view).hexdigest())
        self._done[part.key] = hashes
        self._journal.write(json.dumps({"part": part.key, "sha256": hashes}) + "\n")
        self._journal.flush()

    def _finish(self, file: str, parts: Sequence[Part], readers: ThreadPoolExecutor) -> list[Future[None]]:
        """Has a whole file's parts read back from the disk, not from the memory that they were written through."""
        with (self.folder / file).open("rb", buffering=0) as stream:
            flush(stream)
        return [readers.submit(self._verify, part) for part in parts]

    def _verify(self, part: Part) -> None:
        if self._hashes(part) != self._done[part.key]:
            raise OutputError(
                "what was read back is not what was written",
                where=f"{self.folder / part.places[0].file}: bytes from {part.places[0].start}",
                fix="check the disk, and give the same command again: only such parts are made anew",
            )

    def _hashes(self, part: Part) -> list[str]:
        hashes = []
        buffer = memoryview(bytearray(min(BLOCK, max(place.size for place in part.places))))
        for place in part.places:
            digest, done = hashlib.sha256(), 0
            with (self.folder / place.file).open("rb", buffering=0) as stream:
                while count := read_into(stream, place.start + done, buffer[: place.size - done]):
                    digest.update(buffer[:count])
                    done += count
            hashes.append(digest.hexdigest())
        return hashes


@contextlib.contextmanager
def _one_thread_an_operator() -> Iterator[None]:
    """For this thread and those that begin meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def resumable(output: Path, job: Mapping[str, Any]) -> Iterator[Partial]:
    """A hidden folder that becomes `output` at the end; it stays, to be gone on with, when the work is cut off.

    Args:
        job: what identifies the work, as JSON; parts of another job are thrown away.

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
    with full_disk_explained(output), (folder / JOURNAL).open("a+", encoding="utf-8", errors="replace") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another merge is writing there", where=str(output), fix="wait for it, or choose another --output"
            ) from None
        done = _start(folder, journal, job)
        try:
            yield Partial(folder, journal, done)
        except FinetuneError as error:
            # What is left must be something that the same command can go on with.
            if not done or not isinstance(error, OutputError):
                shutil.rmtree(folder)
            raise
        (folder / JOURNAL).unlink()
        os.replace(folder, output)


def _start(folder: Path, journal: IO[str], job: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts that an earlier, identical job has noted; after another job the folder is emptied."""
    journal.seek(0)
    first, *lines = journal.read().splitlines() or [""]
    wanted = json.dumps({"job": job}, sort_keys=True)
    done: dict[str, list[str]] = {}
    if first == wanted:
        for line in lines:
            with contextlib.suppress(NotJson, KeyError, TypeError):  # the line that a kill cut, or that is damaged
                noted = parse_json(line.encode())
                done[noted["part"]] = noted["sha256"]
        journal.write("\n")  # ends a line that was cut
        return done
    for entry in folder.iterdir():
        if entry.name != JOURNAL:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    journal.truncate(0)
    journal.write(wanted + "\n")
    journal.flush()
    return done
