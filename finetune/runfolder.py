"""The folder a run writes to: claimed before anything is computed, and written so that a kill leaves no half files.

<dir>/run.json          recipe, versions, commit: what makes this folder a run
      recipe.yaml       the resolved recipe, to run it again
      census.json       bytes by role and dtype
      metrics.jsonl     one line a log
      checkpoints/      the trainer's
      adapter/          what was trained
      figures/          PNGs
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import OutputError

RUN_FILE = "run.json"


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

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end: `trainer_state.json` is the last file of one."""
        found = [folder for folder in self.checkpoints.glob("checkpoint-*") if _is_whole(folder)]
        return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def claim(root: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Takes `root` for a run of `recipe` (as a plain mapping); creates nothing if it refuses.

    Raises:
        OutputError: the folder holds another run or other files, cannot be written, or there is nothing to resume.
    """
    run = RunFolder(root)
    occupied = root.is_dir() and any(root.iterdir())
    if root.exists() and not root.is_dir():
        raise OutputError("the output folder is a file", where=str(root), fix="choose another output.dir")
    if resume:
        _require_same_run(run, recipe)
    elif occupied and overwrite and run.run_file.is_file():
        shutil.rmtree(root)
    elif occupied:
        holds = "a run" if run.run_file.is_file() else "other files: " + ", ".join(sorted(os.listdir(root))[:4])
        raise OutputError(
            f"the output folder already holds {holds}",
            where=f"output.dir: {root}",
            fix="continue it with --resume, replace it with --overwrite, or choose another output.dir"
            if run.run_file.is_file()
            else "choose another output.dir",
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be made: {error.strerror}",
            where=f"output.dir: {root}",
            fix="choose a folder that you may write to",
        ) from None
    return run


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Refuses early when the disk under `folder` has fewer than `needed` bytes free.

    Raises:
        OutputError: says both numbers.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"no space left for {what}: it takes about {_mib(needed)}, the disk has {_mib(free)} free",
            where=str(folder),
            fix="free some space, or choose an output folder on another disk",
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def require_fresh(folder: Path) -> None:
    """Refuses a target folder that already holds something.

    Raises:
        OutputError: names the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            "the output folder is not empty", where=str(folder), fix="choose another --output, or remove it first"
        )


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A neighbouring folder to fill; it becomes `folder` by one rename at the end, or is removed on any failure.

    Raises:
        OutputError: `folder` already holds something.
    """
    require_fresh(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_same_run(run: RunFolder, recipe: Mapping[str, Any]) -> None:
    where = f"output.dir: {run.root}"
    try:
        saved = json.loads(run.run_file.read_text(encoding="utf-8"))["recipe"]
    except (OSError, json.JSONDecodeError, KeyError):
        raise OutputError(
            "there is no run to resume", where=where, fix="start it without --resume, or name the folder of a run"
        ) from None
    changed = [
        f"{section}.{key}"
        for section in ("model", "quantization", "trainable", "data", "training", "router")
        for key in sorted({*saved[section], *recipe[section]})
        if saved[section].get(key) != recipe[section].get(key)
    ]
    if changed:
        raise OutputError(
            f"the recipe is not the one this run was started with: {', '.join(changed)} changed",
            where=where,
            allowed=str(run.recipe),
            fix="resume with that recipe, or start a new run in another output.dir",
        )


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
