"""A merge that was cut off goes on where it stopped, and what was written is what the disk gives back."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import OutputError
from finetune.export.resumable import OutputFile, Part, Partial, Place, resumable
from finetune.export.source import open_source
from finetune.export.standard import write_standard
from finetune.export.tunings import Weighted
from tests.running import contents, refused, run_finetune


def test_a_cut_merge_goes_on_where_it_stopped(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source([Weighted(saved_adapter)])

    def write(output: Path) -> int:
        return int(write_standard(source, output, format="bf16", shard_size="100KB")["made_bytes"])

    whole = write(tmp_path / "whole")
    put, count = Partial._put, 0

    def cut(self: Partial, *args: Any) -> None:
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        put(self, *args)

    monkeypatch.setattr(Partial, "_put", cut)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "merged")
    monkeypatch.undo()
    assert not (tmp_path / "merged").exists()
    partial = tmp_path / ".merged.merge.partial"
    first_shard = min(partial.glob("*.safetensors"))
    journal = (partial / "journal.jsonl").read_text().splitlines()
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors")}
    assert len(journal) == 13  # the job and twelve parts
    assert first_shard.stat().st_size == sizes[first_shard.name]
    # A part whose bytes are no longer those of the journal is made again, and so is one whose line the kill cut.
    with first_shard.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    # And those whose lines are damaged in another way.
    damaged = (*journal[:3], "[]", '{"part": []}', "9" * 5000, "\udcff", *journal[7:])
    (partial / "journal.jsonl").write_text("\n".join(damaged)[:-20], errors="surrogateescape")
    made = write(tmp_path / "merged")
    embedding = 32000 * 64 * 2
    assert 0 < made < whole
    assert made > embedding  # the damaged part
    assert contents(tmp_path / "merged").keys() == contents(tmp_path / "whole").keys()
    for name in sizes:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()


def test_another_merge_does_not_go_on_with_it(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".merged.merge.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text(
        '{"job": {"format": "fp16"}}\n{"part": "model.safetensors:0", "sha256": []}\n'
    )
    (partial / "model.safetensors").write_bytes(b"of another merge")
    source = open_source([Weighted(saved_adapter)], onto="original")
    write_standard(source, tmp_path / "merged", format="bf16", shard_size="4GB")
    before, after = (load_file(folder / "model.safetensors") for folder in (small_mixtral, tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name  # an untrained adapter adds nothing
    assert not partial.exists()


def part(file: str, start: int, data: bytes, make: Callable[[], object] = lambda: None) -> Part:
    def made() -> list[np.ndarray]:
        make()
        return [np.frombuffer(data, dtype=np.uint8)]

    return Part((Place(file, start, len(data)),), made)


def test_what_the_disk_gives_back_is_compared(tmp_path: Path) -> None:
    partial = tmp_path / ".out.merge.partial" / "file"

    def damage() -> None:
        with partial.open("r+b") as file:
            file.write(b"X")

    files = {"file": OutputFile(b"", 8)}
    # So many parts before the damage that the first is in the file by then.
    parts = [part("file", n, bytes([65 + n])) for n in range(6)]

    def write(last: Part) -> int:
        with resumable(tmp_path / "out", {}) as opened:
            return opened.write(files, [*parts, last], title="")

    with pytest.raises(OutputError) as caught:
        write(part("file", 6, b"gh", damage))
    message = str(caught.value)
    assert message.startswith("what was read back is not what was written")
    assert "bytes from 0" in message
    assert "give the same command again: only such parts are made anew" in message
    assert write(part("file", 6, b"gh")) == 1
    assert (tmp_path / "out" / "file").read_bytes() == b"ABCDEFgh"


def test_parts_are_made_two_at_a_time_by_one_thread_each(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)
    threads: list[int] = []

    def make() -> None:
        both.wait()
        threads.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with resumable(tmp_path / "out", {}) as opened:
            opened.write(
                {"file": OutputFile(b"", 4)}, [part("file", n, b"ABCD"[n : n + 1], make) for n in range(4)], title=""
            )
        assert (threads, torch.get_num_threads()) == ([1] * 4, 3)
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "out" / "file").read_bytes() == b"ABCD"


def test_parts_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made and not yet written is bounded: it is the merge's memory."""
    put, made, most = Partial._put, 0, 0

    def make() -> None:
        nonlocal made
        made += 1

    def slow(self: Partial, part: Part, future: Any) -> None:
        nonlocal made, most
        time.sleep(0.01)
        most = max(most, made)
        made -= 1
        put(self, part, future)

    monkeypatch.setattr(Partial, "_put", slow)
    with resumable(tmp_path / "out", {}) as opened:
        opened.write({"file": OutputFile(b"", 40)}, [part("file", n, b"A", make) for n in range(40)], title="")
    assert 2 <= most <= 6


def test_a_disk_without_room_is_refused_before_anything_is_made(
    saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    args = ("merge", saved_adapter, "--output", tmp_path / "merged", "--format", "bf16")
    refused(
        tmp_path, *args, says=("no space left for the merged model: it takes about 4 MiB, the disk has 1 MiB free",)
    )


def test_two_merges_to_one_output(tmp_path: Path) -> None:
    with resumable(tmp_path / "out", {}), pytest.raises(OutputError) as caught:
        resumable(tmp_path / "out", {}).__enter__()
    assert str(caught.value).startswith("another merge is writing there")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_a_folder_that_cannot_be_written_is_one_message(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A name that no disk takes, a file in the folder's place, and a disk that turns read-only at the end."""
    args = ("merge", saved_adapter, "--rows", 0) if command == "merge" else ("quantize", small_mixtral)
    (tmp_path / "file").write_text("")
    for output, says in (("n" * 300, "a path is too long for a file system"), ("file/out", "cannot be written")):
        refused(tmp_path, *args, "--device", "cpu", "--output", tmp_path / output, says=(says,))

    def read_only(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    monkeypatch.setattr(os, "replace", read_only)
    ran = run_finetune(*args, "--device", "cpu", "--output", tmp_path / "out")
    assert ran.status == 2
    assert "the output folder cannot be written: Read-only file system" in ran.stderr
    assert f"where: {tmp_path}" in ran.stderr
    assert not (tmp_path / "out").exists()
