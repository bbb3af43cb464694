"""A merge that was cut off resumes where it stopped, and what was written is what the disk gives back."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapter.merging import Weighted, open_source
from finetune.errors import OutputError
from finetune.export import gguf, writing
from finetune.export.formats import write_folder
from finetune.export.writing import Item, Partial, made_ahead, resumable, write_shards
from finetune.moe.base_weights import Tensors
from tests.running import contents, refused, run_finetune


def test_a_cut_merge_resumes_where_it_stopped(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source([Weighted(saved_adapter)])

    def write(output: Path) -> int:
        return int(write_folder(source, output, format="bf16", shard_size="100KB")["made_bytes"])

    whole = write(tmp_path / "whole")
    save, count = save_file, 0

    def cut(tensors: dict[str, Tensor], file: Path, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            file.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        save(tensors, file, **kwargs)

    monkeypatch.setattr(writing, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "merged")
    monkeypatch.undo()
    assert not (tmp_path / "merged").exists()
    partial = tmp_path / ".merged.merge.partial"
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors")}
    there = {file.name: file.stat().st_size for file in partial.glob("model-*.safetensors")}
    assert len(there) == 5
    assert there == {name: sizes[name] for name in there}, "a shard is whole or not there"
    assert json.loads((partial / "done.json").read_text())["done"].keys() == there.keys()
    # A shard whose bytes are no longer those that were noted is made again, and so is one that is cut short.
    first, second, *_ = sorted(there)
    with (partial / first).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with (partial / second).open("r+b") as file:
        file.truncate(there[second] // 2)
    made = write(tmp_path / "merged")
    embedding = 32000 * 64 * 2
    assert embedding < made < whole  # the embedding has the first shard
    assert contents(tmp_path / "merged").keys() == contents(tmp_path / "whole").keys()
    for name in (*sizes, "model.safetensors.index.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    "noted",
    [
        '{"job": {"format": "fp16"}, "done": {"model.safetensors": {}}}',
        '{"job"',
        "[]",
        '{"job": JOB, "done": {"model.safetensors": {"lm_head.weight": "0"}}}',
        '{"job": JOB, "done": {"model.safetensors": 5}}',
    ],
    ids=["of another merge", "cut", "no object", "other hashes", "no hashes"],
)
def test_what_cannot_be_used_is_made_anew(saved_adapter: Path, tmp_path: Path, noted: str) -> None:
    source = open_source([Weighted(saved_adapter)], onto="original")
    job = {**source.identity, "format": "bf16", "shard_size": 4 * 10**9}
    partial = tmp_path / ".merged.merge.partial"
    partial.mkdir()
    (partial / "done.json").write_text(noted.replace("JOB", json.dumps(job)))
    (partial / "model.safetensors").write_bytes(b"of another merge")
    (partial / ".model.safetensors").write_bytes(b"half")
    about = write_folder(source, tmp_path / "merged", format="bf16", shard_size="4GB")
    before, after = (load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "merged"))
    assert about["made_bytes"] == sum(tensor.nbytes for tensor in before.values())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name  # an untrained adapter adds nothing
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name.startswith((".", "done"))]


def item(name: str, value: int) -> Item:
    return Item(8, lambda: {name: torch.full((8,), value, dtype=torch.uint8)})


def test_what_the_disk_gives_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two shards one is damaged after it was written; then it alone is made anew."""
    note = Partial.note

    def damage(self: Partial, name: str, hashes: object) -> None:
        note(self, name, hashes)
        if name.startswith("model-00001"):
            with (self.folder / name).open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"X")

    def write() -> int:
        with resumable(tmp_path / "out", {}) as filled:
            return write_shards(filled, [item("a", 1), item("b", 2)], 8, title="")[1]

    monkeypatch.setattr(Partial, "note", damage)
    with pytest.raises(OutputError) as caught:
        write()
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith("what was read back is not what was written")
    assert "model-00001-of-00002.safetensors" in message
    assert "give the same command again: only what is damaged is made anew" in message
    assert write() == 8
    assert Tensors(tmp_path.glob("out/*.safetensors")).read("a").tolist() == [1] * 8


def test_a_gguf_resumes_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is too large to be made at once; a part goes to several places of it."""
    data = np.arange(40, dtype=np.uint8)

    def part(n: int, *, cut: bool = False) -> gguf.Part:
        def make() -> list[np.ndarray]:
            if cut:
                raise KeyboardInterrupt
            return [data[4 * n : 4 * n + 4], data[20 + 4 * n : 24 + 4 * n]]

        return gguf.Part(((8 + 4 * n, 4), (28 + 4 * n, 4)), make)

    def fill(parts: list[gguf.Part]) -> int:
        with resumable(tmp_path / "out", {}) as filled:
            return gguf.fill(filled, "x.gguf", gguf.Layout(b"8 bytes.", 48, parts), title="")

    with pytest.raises(KeyboardInterrupt):
        fill([*(part(n) for n in range(4)), part(4, cut=True)])
    file = tmp_path / ".out.merge.partial" / "x.gguf"
    with file.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"X")
    assert fill([part(n) for n in range(5)]) < 40
    assert (tmp_path / "out" / "x.gguf").read_bytes() == b"8 bytes." + data.tobytes()
    read = gguf._hashes_in
    monkeypatch.setattr(gguf, "_hashes_in", lambda path, part: [*read(path, part), "another"])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputError, match="what was read back is not what was written") as caught:
        fill([part(0)])
    assert "bytes from 8" in str(caught.value)


def test_tensors_are_made_two_at_a_time_by_one_thread_each_and_few_ahead() -> None:
    """What is made and not yet taken is bounded: it is the merge's memory."""
    both, threads, made, most = threading.Barrier(2, timeout=60), [], 0, 0

    def make(number: int) -> int:
        nonlocal made
        both.wait()
        threads.append(torch.get_num_threads())
        made += 1
        return number

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        taken = []
        for number, result in made_ahead(range(20), make):
            taken.append((number, result))
            time.sleep(0.005)
            most = max(most, made - len(taken))
        assert taken == [(n, n) for n in range(20)]
        assert (threads, torch.get_num_threads()) == ([1] * 20, 3)
        assert 1 <= most <= 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_read_alone_and_their_maps_go_with_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a": torch.randn(3, 5, 8, generator=generator).to(torch.bfloat16),
        "b": torch.randn(4, 5, 8, generator=generator),
        "c": torch.randint(0, 256, (2, 3, 2**21), generator=generator).to(torch.uint8),
        "d": torch.randn(4, generator=generator),
    }
    save_file(stored, tmp_path / "file.safetensors")
    tensors = Tensors([tmp_path / "file.safetensors"])
    for name, tensor in stored.items():
        assert torch.equal(tensors.read(name), tensor)
        for row in range(len(tensor)):
            assert torch.equal(tensors.read(name, row=row), tensor[row])
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_pages_are_let_go_of_on_linux_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with resumable(tmp_path / "out", {}) as filled:
        write_shards(filled, [item("a", 1)], 8, title="")
    assert (tmp_path / "out" / "model.safetensors").is_file()


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
