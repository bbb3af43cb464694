"""The files that hold what was trained, and the checks that they share.

Names and shapes in a safetensors header are compared with what a base needs before a tensor is loaded.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from finetune.checkpoint import read_tensor_infos
from finetune.errors import AdapterError, OutputError
from finetune.runfolder import RunFolder

LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"
NON_MOE_CONFIG, NON_MOE_TENSORS = "non_moe.json", "non_moe.safetensors"
Kind = Literal["lora", "non_moe"]
Shapes = dict[str, tuple[int, ...]]


def tuned_folder(path: str | Path) -> Path:
    """The adapter's folder, for itself or the run's; every other path as it is.

    Raises:
        AdapterError: the run has no adapter yet.
    """
    folder = Path(path)
    run = RunFolder(folder)
    if not run.run_file.is_file():
        return folder
    if kind_of(run.adapter) is None:
        saved = sorted(run.checkpoints.glob("checkpoint-*"), key=lambda saved: saved.stat().st_mtime)
        newest = f", or name a checkpoint of it, such as {saved[-1]}" if saved else ""
        raise AdapterError(
            "the run has not come to its end, so there is no adapter in it",
            where=str(folder),
            allowed="the folder of a finished run, or of an adapter",
            fix=f"go on with it: finetune train {shlex.quote(str(folder))} --resume{newest}",
        )
    return run.adapter


def kind_of(folder: Path) -> Kind | None:
    """What kind of tuned weights a folder holds, by its file names; None when it holds neither."""
    if (folder / LORA_CONFIG).is_file():
        return "lora"
    if (folder / NON_MOE_TENSORS).is_file() or (folder / NON_MOE_CONFIG).is_file():
        return "non_moe"
    return None


def read_shapes(path: Path) -> Shapes:
    """Names and shapes from a safetensors header; a truncated file fails here already."""
    require_file(path)
    return {info.name: info.shape for info in read_tensor_infos(path, kind=AdapterError)}


def require_file(path: Path) -> None:
    """Refuses a path where there is no file, and says what its folder holds."""
    if not path.is_file():
        present = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else None
        raise AdapterError(
            f"{path.name} is missing" if present is not None else f"no adapter folder {str(path.parent)!r}",
            where=str(path) if present is None else f"{path.parent} (holds: {present or 'nothing'})",
            allowed=f"a folder with {LORA_CONFIG} and {LORA_TENSORS}, or with {NON_MOE_TENSORS}",
            fix="give the folder that a training run saved",
        )


def require_same(found: Shapes, expected: Shapes, path: Path, *, what: str, fix: str) -> None:
    """Refuses tensors that are missing, unknown or of another shape; names the first of each."""
    missing = [f"missing {name}" for name in expected if name not in found]
    unknown = [f"unknown {name}" for name in found if name not in expected]
    shaped = [
        f"{name} is {list(found[name])}, this model needs {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [*shaped[:2], *missing[:2], *unknown[:2]]
    if faults:
        counts = f"{len(shaped)} tensors of another shape, {len(missing)} missing, {len(unknown)} unknown"
        raise AdapterError(f"{what}: {counts}", where=f"{path}: {'; '.join(faults)}", fix=fix)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to and rename; whatever goes wrong, it is removed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"could not be written: {error}", where=str(path), fix="free space there, or choose another output folder"
        ) from error
