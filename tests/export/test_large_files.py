"""Matrices and files larger than a cache: memory that serves again, pages that are let go of, tensors read alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune.export import buffers, page_cache
from finetune.export.tensors import Tensors

SIZE = 2**22


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_serves_again_when_nothing_refers_to_it() -> None:
    buffers.release()
    first = buffers.take(2 * SIZE)
    where = address(first)
    view = torch.from_numpy(first).view(torch.bfloat16).view(-1, 64)[5:7]
    bytes_of_view = view.contiguous().view(-1).view(torch.uint8).numpy()
    del first
    view.fill_(3)
    second = buffers.take(2 * SIZE)
    assert address(second) != where  # two views are left
    second[:] = 0
    assert (view == 3).all()
    del view
    third = buffers.take(SIZE)
    assert address(third) != where
    del bytes_of_view
    fourth = buffers.take(SIZE)  # a smaller one fits
    assert (address(fourth), fourth.nbytes) == (where, SIZE)
    del second, third, fourth
    larger = buffers.take(3 * SIZE)  # in place of one that is too small: two are kept beside it
    assert len(buffers._free) == 2
    del larger
    buffers.release()
    assert not buffers._free


def test_what_fills_a_window_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    fsync, fadvise = os.fsync, os.posix_fadvise

    def synced(file: int) -> None:
        events.append(os.fstat(file).st_size)
        fsync(file)

    def advised(file: int, start: int, size: int, advice: int) -> None:
        events.append((start, size))
        fadvise(file, start, size, advice)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(page_cache, "WINDOW", 100)
    monkeypatch.setattr(page_cache, "BLOCK", 64)
    data = np.random.default_rng(0).integers(0, 256, 250, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"header")
    with path.open("r+b", buffering=0) as stream:
        page_cache.write_from(stream, 6, data.data)
    assert path.read_bytes() == b"header" + data.tobytes()
    assert events == [106, (0, 0), 206, (0, 0)]  # let go of after it is on the disk
    events.clear()
    into = bytearray(300)
    with path.open("rb", buffering=0) as stream:
        assert page_cache.read_into(stream, 106, memoryview(into)[:100]) == 100
        assert into[:100] == data[100:200].tobytes()
        assert events == [(106, 64), (170, 36)]
        assert page_cache.read_into(stream, 6, memoryview(into)) == 250  # the file ends
    assert into[:250] == data.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="no page is let go of elsewhere")
def test_nothing_is_let_go_of_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "posix_fadvise")
    path = tmp_path / "file"
    path.write_bytes(b"0123")
    with path.open("r+b", buffering=0) as stream:
        page_cache.flush(stream)
        into = bytearray(2)
        assert page_cache.read_into(stream, 1, memoryview(into)) == 2
    assert into == b"12"


def test_tensors_are_read_alone_by_rows_and_joined(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a": torch.randn(3, 5, 8, generator=generator).to(torch.bfloat16),
        "b": torch.randn(2, 5, 8, generator=generator).to(torch.bfloat16),
        "c": torch.randn(4, 5, 8, generator=generator),
        "large": torch.randint(0, 256, (2, 3, 2**21), generator=generator).to(torch.uint8),
    }
    save_file(stored, tmp_path / "file.safetensors")
    tensors = Tensors([tmp_path / "file.safetensors"])
    for name, tensor in stored.items():
        assert torch.equal(tensors.read(name), tensor)
        for row in range(len(tensor)):
            assert torch.equal(tensors.read(name, row=row), tensor[row])
    for names in (["a"], ["b", "a"], ["a", "b", "a"], ["a", "c"], ["large", "large"]):
        assert torch.equal(tensors.read_joined(names), torch.cat([stored[name] for name in names]))
