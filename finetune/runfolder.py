"""The folder a run writes to: refused before anything is computed, claimed before anything is written, and written so
that a kill leaves no half files.

<dir>/run.json          recipe, versions, commit: what makes this folder a run
      recipe.yaml       the resolved recipe, to run it again
      census.json       bytes by role and dtype
      data.json         the report on the data
      metrics.jsonl     one line a log
      checkpoints/      the trainer's
      adapter/          what was trained
      figures/          PNGs
      router/           the base's routing, what it became, alarms
      tensorboard/      event files, with logging.tensorboard

A claim moves what the folder holds aside, and back again if the run does not come about. The folder's own name tells
how far it came, and each name is given by one rename, so that a kill at any moment leaves what `restore` finds:

      .claiming.X.partial   belongs beside it: being moved aside, or back
      .aside.X.partial      all that the folder held; what lies beside it is of a claim that did not come to its end
      .replaced.X.partial   no longer wanted

A lock on it, which ends with its process, tells a claim that was cut off from one at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.disk import EARLIER, move_all, remove, scratch
from finetune.errors import OutputError

RUN_FILE = "run.json"
# What a resumed run must share with the one it continues.
_FIXED_SECTIONS = ("model", "quantization", "trainable", "data", "training", "router")
# Names of what is put aside.
_CLAIMING, _ASIDE, _REPLACED = ".claiming.", ".aside.", ".replaced."


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def run_file(self) -> Path:
        return self.root / RUN_FILE

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def census(self) -> Path:
        return self.root / "census.json"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def router(self) -> Path:
        return self.root / "router"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"


def run_of(folder: Path) -> Path:
    """The run's folder, for the run's or one in it, such as its adapter's; every other path as it is."""
    if (folder / RUN_FILE).is_file() or not folder.is_dir():
        return folder
    above = Path(os.path.normpath(folder / ".."))
    return above if (above / RUN_FILE).is_file() else folder


def require_claimable(
    root: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Checks that `root` may be taken for a run of `recipe` (as a plain mapping); touches nothing.

    Raises:
        OutputError: the folder holds another run or other files, or there is nothing to resume.
    """
    run, where = RunFolder(root), f"output.dir: {root}"
    occupied = root.is_dir() and any(root.iterdir())
    if resume and overwrite:
        raise OutputError(
            "--resume continues a run and --overwrite replaces it",
            where="command line",
            allowed="one of the two",
            fix="leave one of them out",
        )
    if root.exists() and not root.is_dir():
        raise OutputError("the output folder is a file", where=where, fix="choose another output.dir")
    if resume:
        _require_same_run(run, recipe)
    elif occupied and not run.run_file.is_file():
        raise OutputError(
            f"the output folder already holds other files: {', '.join(sorted(os.listdir(root))[:4])}",
            where=where,
            fix="choose another output.dir; --overwrite replaces a run, never other files",
        )
    elif occupied and not overwrite:
        raise OutputError(
            "the output folder already holds a run",
            where=where,
            fix="continue it with --resume, replace it with --overwrite, or choose another output.dir",
        )
    return run


@contextlib.contextmanager
def claimed(
    root: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Takes `root` for a run of `recipe`; if the body raises, the folder is as it was before, a replaced run included.

    Where the disk does not allow that, it stays for `restore`, and the body's own error is raised all the same.

    Raises:
        OutputError: as `require_claimable`, or the folder cannot be made.
    """
    run = require_claimable(root, recipe, resume=resume, overwrite=overwrite)
    if resume:
        yield run
        return
    existed = root.is_dir()
    # Inside the folder, which may be a mount point that cannot be renamed.
    aside = scratch(root, prefix=_CLAIMING)
    with _locked(aside):
        try:
            move_all(root, aside)
            aside = _renamed(aside, _ASIDE)
            yield run
        except BaseException:
            # What cannot be undone now, `restore` undoes at the next start; what went wrong first is what is said.
            with contextlib.suppress(OSError):
                _put_back(root, aside)
                if not existed:
                    root.rmdir()
            raise
        aside = _renamed(aside, _REPLACED)
    shutil.rmtree(aside)


def restore(root: Path) -> list[str]:
    """Puts right what a process that was killed left in the folder of a run; says what it did, a line each.

    A claim that was cut off is undone, a folder being replaced is in its place again, half-written ones are removed.

    Raises:
        OutputError: another process is claiming the folder now.
    """
    said: list[str] = []
    for aside in (*root.glob(f"{_CLAIMING}*.partial"), *root.glob(f"{_ASIDE}*.partial")):
        with _locked(aside):
            if any(aside.iterdir()):
                said.append(f"{root}: the --overwrite that was putting its run aside was cut off; the run is back")
            _put_back(root, aside)
    for earlier in root.glob(f".*{EARLIER}*.partial"):
        name = earlier.name[1:].partition(EARLIER)[0]
        if not (root / name).exists():
            os.replace(earlier, root / name)
            said.append(f"{root / name}: what was to replace it was not finished; it is back")
    for pattern in (f"{_REPLACED}*.partial", f".*{EARLIER}*.partial", ".adapter.*.partial", ".*.json.*.partial"):
        for left in root.glob(pattern):
            remove(left)
    return said


def set_aside(root: Path) -> bool:
    """Whether a claim, cut off or at work, has put aside what this folder held."""
    return any(root.glob(f"{_CLAIMING}*.partial/*")) or any(root.glob(f"{_ASIDE}*.partial/*"))


def _put_back(root: Path, aside: Path) -> None:
    """The folder as it was; may be cut off and repeated at any moment."""
    if aside.name.startswith(_ASIDE):
        for entry in set(root.iterdir()) - {aside}:
            remove(entry)
        aside = _renamed(aside, _CLAIMING)
    move_all(aside, root)
    aside.rmdir()


def _renamed(aside: Path, prefix: str) -> Path:
    """The folder that a claim moves things to, one stage on; its lock goes with it."""
    named = aside.with_name(prefix + aside.name.split(".", 2)[2])
    os.replace(aside, named)
    return named


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder until the block ends, or the process.

    Raises:
        OutputError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OutputError(
            "another process is starting a run in the output folder now",
            where=f"output.dir: {folder.parent}",
            fix="wait for it, or choose another output.dir",
        ) from None
    except OSError:
        pass  # a file system without locks, as some network ones are
    try:
        yield
    finally:
        os.close(handle)


def _require_same_run(run: RunFolder, recipe: Mapping[str, Any]) -> None:
    where = f"output.dir: {run.root}"
    try:
        saved = _flat(json.loads(run.run_file.read_text(encoding="utf-8"))["recipe"])
    except (FileNotFoundError, NotADirectoryError):
        raise OutputError(
            "there is no run to resume", where=where, fix="start it without --resume, or name the folder of a run"
        ) from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise OutputError(
            f"the run cannot be resumed: its {RUN_FILE} is damaged",
            where=str(run.run_file),
            fix="restore the file as `finetune train` wrote it, or start the run again with --overwrite",
        ) from None
    now = _flat(recipe)
    changed = [
        f"{key} was {saved.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and key.split(".")[0] in _FIXED_SECTIONS
    ]
    if changed:
        raise OutputError(
            f"the recipe is not the one this run was started with: {'; '.join(changed)}",
            where=where,
            allowed=str(run.recipe),
            fix="resume with that recipe, or start a new run in another output.dir",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
