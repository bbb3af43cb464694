"""What is written to a disk, whole or not at all; and what a full disk or one that cannot be written says.

A file or folder is made under a hidden name beside its place and gets its own by one rename, so that a kill leaves no
half. Leaves out what a run's folder holds (runfolder.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.console import strict_json
from finetune.errors import FinetuneError, OutputError

EARLIER = ".earlier."  # begins the name of a folder that is being replaced
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Read-only, forbidden, a mount point in the place of a folder, broken, or a file larger than it may be.
_UNWRITABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV, errno.EIO),
    *(errno.EFBIG, errno.ENOTDIR),
)
_DISK_FULL_SIGNS = (*(f"(os error {code})" for code in _DISK_FULL), "unexpected pos", "PytorchStreamWriter failed")


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


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; none if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
    write_text(path, json.dumps(strict_json(content), indent=2, allow_nan=False) + "\n")


def require_fresh(folder: Path) -> None:
    """Refuses a target folder that already holds something.

    Raises:
        OutputError: names the folder.
    """
    with full_disk_explained(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise OutputError(
            "the output folder is not empty", where=str(folder), fix="choose another --output, or remove it first"
        )


@contextlib.contextmanager
def staged(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A neighbouring folder to fill; it becomes `folder` by one rename at the end, or is removed on any failure.

    Args:
        replace: an earlier `folder` gives way at the end; without, it is refused at the beginning.

    Raises:
        OutputError: `folder` already holds something, cannot be written, or the disk is full.
    """
    if not replace:
        require_fresh(folder)
    partial = scratch(folder.parent, prefix=f".{folder.name}.")
    try:
        partial.chmod(0o755)
        with full_disk_explained(folder):
            yield partial
            if folder.is_dir():
                earlier = scratch(folder.parent, prefix=f".{folder.name}{EARLIER}")
                os.replace(folder, earlier)
                os.replace(partial, folder)
                shutil.rmtree(earlier)
            else:
                os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class full_disk_explained:
    """Turns whatever a library raises when the disk is full, or cannot be written, into one message.

    Args:
        where: the output folder; words where it is not known.
        then: what can be done once there is space.

    Raises:
        OutputError: says where.
    """

    def __init__(self, where: Path | str, *, then: str | None = None):
        self.where, self.then = where, then

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        # Not an `except`: tokenizers raises a bare Exception, so there is no narrower type to name.
        if error is not None and is_disk_full(error):
            raise OutputError(
                "no space left on the disk",
                where=str(self.where),
                fix="free some space" + (f"; {self.then}" if self.then else ", or choose another output folder"),
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            place = Path(error.filename or self.where).absolute()
            output = Path(self.where).absolute().parent  # what is staged lies beside its place
            if isinstance(self.where, Path) and (place.is_relative_to(output) or output.is_relative_to(place)):
                what, fix = "the output folder cannot be written", "choose a folder that you may write to"
            else:
                what, fix = "a file cannot be read or written", "check who may read and write it"
            raise OutputError(f"{what}: {error.strerror}", where=str(error.filename or self.where), fix=fix) from error


@contextlib.contextmanager
def long_names_explained() -> Iterator[None]:
    """Turns a path that no disk holds, which any look at it raises, into one message.

    Raises:
        FinetuneError: names the beginning of the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FinetuneError(
            "a path is too long for a file system",
            where=f"{str(error.filename)[:100]}...",
            allowed="names of at most 255 bytes, paths of at most 4,096",
            fix="check the path",
        ) from None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full.

    safetensors and tokenizers say so in their text only, `torch.save` complains about a position in its file.
    """
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(sign in str(error) for sign in _DISK_FULL_SIGNS)


def scratch(folder: Path, *, prefix: str) -> Path:
    """A new folder in `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # By its name: from Python 3.12 on the path is absolute, whatever `folder` is, and would not equal its entry.
        return folder / Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=folder)).name
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be written: {error.strerror}",
            where=str(folder),
            fix="choose a folder that you may write to",
        ) from None


def remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def move_all(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        if entry != target:
            os.replace(entry, target / entry.name)


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
