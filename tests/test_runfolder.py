"""The output folder: who may take it, that a failure gives it back, and that nothing in it is ever half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune import runfolder
from finetune.disk import (
    folder_bytes,
    full_disk_explained,
    is_disk_full,
    require_fresh,
    require_space,
    staged,
    write_json,
    write_text,
)
from finetune.errors import OutputError
from finetune.runfolder import RunFolder, claimed, require_claimable, restore
from tests.running import contents

SECTIONS = ("model", "quantization", "trainable", "data", "training", "router", "logging", "output")


def recipe(**sections: dict[str, Any]) -> dict[str, Any]:
    return {name: sections.get(name, {}) for name in SECTIONS}


def a_run(root: Path, **sections: dict[str, Any]) -> RunFolder:
    with claimed(root, recipe(**sections)) as run:
        write_json(run.run_file, {"recipe": recipe(**sections)})
    return run


def write_and_fail(
    opened: AbstractContextManager[RunFolder | Path], error: BaseException, at_last: Callable[[], object] | None = None
) -> None:
    with opened as folder:
        root = folder.root if isinstance(folder, RunFolder) else folder
        assert not (root / "checkpoints").exists()
        write_text(root / "below" / "weights", "half")
        write_text(root / "recipe.yaml", "text")
        if at_last:
            at_last()
        raise error


# ---- claiming -------------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = a_run(tmp_path / "outputs" / "run")
    assert run.run_file.is_file()
    assert contents(tmp_path / "outputs").keys() == {"run", "run/run.json"}


@pytest.mark.parametrize("error", [OutputError("refused"), RuntimeError("ours"), KeyboardInterrupt()])
def test_a_failure_gives_the_folder_back(tmp_path: Path, error: BaseException) -> None:
    empty, old = tmp_path / "empty", tmp_path / "old"
    empty.mkdir()
    a_run(old)
    (old / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (old / "checkpoints" / "checkpoint-2" / "weights").write_bytes(b"weights")
    before = contents(tmp_path)
    for root, overwrite in ((tmp_path / "new", False), (empty, False), (old, True)):
        with pytest.raises(type(error)):
            write_and_fail(claimed(root, recipe(), overwrite=overwrite), error)
        assert contents(tmp_path) == before


def test_what_cannot_be_undone_does_not_hide_why_it_had_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder gone, something in a new one that comes after it is emptied, a disk that moves nothing."""
    with pytest.raises(OutputError, match="refused"):
        write_and_fail(
            claimed(tmp_path / "gone", recipe()), OutputError("refused"), partial(shutil.rmtree, tmp_path / "gone")
        )
    put_back = runfolder._put_back

    def and_another_writes(root: Path, aside: Path) -> None:
        put_back(root, aside)
        (root / "of another").write_text("")

    monkeypatch.setattr(runfolder, "_put_back", and_another_writes)
    with pytest.raises(OutputError, match="refused"), claimed(tmp_path / "new", recipe()):
        raise OutputError("refused")
    assert contents(tmp_path / "new") == {"of another": b""}
    monkeypatch.undo()

    def no_moves() -> None:
        monkeypatch.setattr(os, "replace", _fails)

    root = tmp_path / "old"
    a_run(root)
    before = contents(root)
    with pytest.raises(OutputError, match="refused"):
        write_and_fail(claimed(root, recipe(), overwrite=True), OutputError("refused"), no_moves)
    monkeypatch.undo()
    assert restore(root) == [f"{root}: the --overwrite that was putting its run aside was cut off; the run is back"]
    assert contents(root) == before


def _fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_overwriting_removes_the_old_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    a_run(root)
    (root / "checkpoints").mkdir()
    with claimed(root, recipe(), overwrite=True) as run:
        write_text(run.recipe, "new")
    assert contents(root) == {"recipe.yaml": b"new"}


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on `tempfile.mkdtemp` gives an absolute path, also where `dir` is relative."""
    made = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **where: str(Path(made(**where)).absolute()))
    monkeypatch.chdir(tmp_path)
    with claimed(Path("run"), {"a": 1}):
        Path("run/new").write_text("new")
    assert contents(tmp_path / "run") == {"new": b"new"}


def test_a_resumed_run_is_left_alone_by_a_failure(tmp_path: Path) -> None:
    root = tmp_path / "run"
    a_run(root)
    before = contents(root)
    with pytest.raises(RuntimeError), claimed(root, recipe(), resume=True):
        raise RuntimeError
    assert contents(root) == before


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Does the work in a process that ends just before its operation of that number on files; whether it got there."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (event == "open" and args[1] == "w"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_operation_leaves_the_old_run_or_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "run"
    a_run(root)
    for name in ("adapter", "checkpoints"):
        (root / name).mkdir()
        (root / name / "weights").write_bytes(name.encode())
    old = contents(root)

    def overwrite() -> None:
        with claimed(root, recipe(), overwrite=True) as run:
            write_text(run.run_file, "new")
            write_text(run.recipe, "new")

    def replace() -> None:
        with staged(root / "adapter", replace=True) as folder:
            write_text(folder / "weights", "new")

    overwritten = {"run.json": b"new", "recipe.yaml": b"new"}
    for work, new in ((replace, {**old, "adapter/weights": b"new"}), (overwrite, overwritten)):
        operation = 0
        while contents(root) == old:
            killed = killed_at(operation, work)
            killed_at(1 + operation % 6, lambda: restore(root))  # what puts it right may be cut off too
            restore(root)
            assert contents(root) in (old, new), operation
            operation += 1
        assert operation > 6
        assert killed, "only removing what is old comes after that"
        (root / "adapter" / "weights").write_bytes(b"adapter") if work == replace else None
    a_claim = f"{root}: the --overwrite that was putting its run aside was cut off; the run is back"
    (root / ".claiming.x.partial").mkdir()
    os.replace(root / "run.json", root / ".claiming.x.partial" / "run.json")
    assert restore(root) == [a_claim]
    assert contents(root) == overwritten
    assert restore(root) == []


def test_a_claim_at_work_is_not_taken_for_one_that_was_cut_off(tmp_path: Path) -> None:
    a_run(tmp_path)
    with claimed(tmp_path, recipe(), overwrite=True) as run:
        write_text(run.recipe, "new")
        with pytest.raises(OutputError) as refusal:
            restore(tmp_path)
        assert str(refusal.value).startswith("another process is starting a run in the output folder now\n  where: ")
        assert run.recipe.read_text() == "new"
    assert restore(tmp_path) == []


def test_two_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", recipe()), pytest.raises(OutputError, match="already holds"):
        require_claimable(tmp_path / "run", recipe())


def test_only_what_decides_the_result_must_be_the_same(tmp_path: Path) -> None:
    root = tmp_path / "run"
    a_run(root, training={"seed": 1, "optim_args": {"beta": [1, 2]}}, logging={"wandb": "offline"}, output={"dir": "a"})
    same = recipe(training={"seed": 1, "optim_args": {"beta": [1, 2]}}, output={"dir": "b"})
    assert require_claimable(root, same, resume=True) == RunFolder(root)
    other = recipe(training={"optim_args": {"beta": [1, 3]}}, model={"path": "m"})
    with pytest.raises(OutputError) as refusal:
        require_claimable(root, other, resume=True)
    changes = (
        "model.path was not set, is m; training.optim_args.beta was [1, 2], is [1, 3]; training.seed was 1, is not"
    )
    assert changes in str(refusal.value)
    assert str(root / "recipe.yaml") in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": null}', '{"recipe": "text"}', "\udcff"])
def test_a_damaged_run_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OutputError, match=r"its run\.json is damaged") as refusal:
        require_claimable(tmp_path, recipe(), resume=True)
    assert str(tmp_path / "run.json") in str(refusal.value)


# ---- writing --------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "below" / "file.json"
    write_json(file, {"loss": float("nan"), "steps": 3, "names": ("a", "b")})
    assert json.loads(file.read_text()) == {"loss": None, "steps": 3, "names": ["a", "b"]}
    before = contents(tmp_path)

    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "something else")
    assert contents(tmp_path) == before


def test_a_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "below" / "model"
    with staged(target) as folder:
        (folder / "weights").write_bytes(b"weights")
        assert not target.exists()
        assert folder.parent == target.parent
    assert contents(target) == {"weights": b"weights"}
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with pytest.raises(OutputError, match="is not empty"), staged(target):
        raise AssertionError("not reached")


def test_a_staged_folder_may_take_an_empty_one_or_replace(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    for text, replace in (("first", False), ("second", True)):
        with staged(target, replace=replace) as folder:
            (folder / text).write_text(text)
        assert [path.name for path in target.iterdir()] == [text]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_nothing_staged(tmp_path: Path, error: BaseException) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "weights").write_bytes(b"weights")
    before = contents(tmp_path)
    for target, replace in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
            write_and_fail(staged(target, replace=replace), error)
        assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for taken in (staged(file / "below"), claimed(file / "below", recipe())):
        with pytest.raises(OutputError, match="cannot be written") as refusal, taken:
            raise AssertionError("not reached")
        assert str(file) in str(refusal.value)
    with pytest.raises(OutputError, match="not empty"):
        require_fresh(file)
    require_fresh(tmp_path / "none")


# ---- space ----------------------------------------------------------------------------------------------------


def test_space_is_asked_of_the_disk_that_will_hold_the_folder(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, what="a byte")
    with pytest.raises(OutputError) as refusal:
        require_space(tmp_path / "not" / "yet", 2**60, what="a large model")
    assert "no space left for a large model: it takes about 1073741824.0 GiB, the disk has " in str(refusal.value)
    assert f"where: {tmp_path}/not/yet" in str(refusal.value)


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "none") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"12345")
    (tmp_path / "file").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8


FULL = "no space left on the disk"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FULL),
        (Exception("No space left on device (os error 28)"), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), FULL),
        # A damaged file that is read, not written.
        (RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip"), None),
        (OSError(errno.EACCES, "Permission denied"), "the output folder cannot be written: Permission denied"),
        (ValueError("something else"), None),
    ],
)
def test_what_a_full_disk_looks_like(error: Exception, says: str | None) -> None:
    assert is_disk_full(error) is (says == FULL)
    with pytest.raises(OutputError if says else type(error)) as raised, full_disk_explained(Path("/some/where")):
        raise error
    assert not says or f"{says}\n  where: /some/where\n" in str(raised.value)


def test_a_file_elsewhere_is_not_the_output_folder() -> None:
    with pytest.raises(OutputError) as raised, full_disk_explained(Path("/some/where")):
        raise PermissionError(errno.EACCES, "Permission denied", "/models/base/model.safetensors")
    said = "a file cannot be read or written: Permission denied\n  where: /models/base/model.safetensors\n"
    assert said in str(raised.value)
