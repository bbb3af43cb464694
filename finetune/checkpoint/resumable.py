"""A run's checkpoints: which one a run goes on from, and what is wrong with those that are passed over.

What `torch.save` wrote is a zip archive, whose directory is at its end and has a checksum for each of its parts; of
those only the small ones are read.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoint.headers import check_safetensors
from finetune.checkpoint.json_file import read_json
from finetune.errors import OutputError

# The last file that is written of a checkpoint, and the one of the two that holds what was trained.
_STATE, _TRAINED = "trainer_state.json", ("adapter_model.safetensors", "non_moe.safetensors")
_SMALL = 2**20  # bytes of a part of a zip archive that is read


@dataclass(frozen=True)
class Checkpoints:
    """What a run has to go on from.

    Attributes:
        newest: the newest whole one.
        passed: what is wrong with those that are newer, a line each.
    """

    newest: Path | None
    passed: tuple[str, ...]


def find_checkpoints(folder: Path, *, only_model: bool, processes: int = 1) -> Checkpoints:
    """The newest whole checkpoint below `folder`.

    Args:
        only_model: whether the run saves what it trains alone (`save_only_model`).
        processes: those that will go on; each has a random state of its own.

    Raises:
        OutputError: there are checkpoints that were written to their end, and all of them are damaged.
    """
    numbered = [(int(name), path) for path in folder.glob("checkpoint-*") if (name := path.name[11:]).isdecimal()]
    passed: list[str] = []
    damaged = False
    for step, path in sorted(numbered, reverse=True):
        if not (path / _STATE).is_file():
            passed.append(f"{path.name} was not written to its end")
            continue
        try:
            _check_checkpoint(path, step, only_model=only_model, processes=processes)
        except OutputError as error:
            passed.append(f"{path.name} is damaged: {error.what}")
            damaged = True
        else:
            return Checkpoints(path, tuple(passed))
    if damaged:
        raise OutputError(
            f"there is no whole checkpoint to continue from: {'; '.join(passed)}",
            where=str(folder),
            fix="copy the damaged files again, or start the run again with --overwrite instead of --resume",
        )
    return Checkpoints(None, tuple(passed))


def _check_checkpoint(folder: Path, step: int, *, only_model: bool, processes: int) -> None:
    """
    Raises:
        OutputError: a file of it is missing or damaged.
    """
    if read_json(folder / _STATE, kind=OutputError).get("global_step") != step:
        raise OutputError(f"{_STATE} is not that of step {step}")
    trained = [folder / name for name in _TRAINED if (folder / name).is_file()]
    if not trained:
        raise OutputError(f"there is no {' or '.join(_TRAINED)}")
    check_safetensors(trained[0], kind=OutputError)
    if trained[0].name.startswith("adapter"):
        read_json(folder / "adapter_config.json", kind=OutputError)
    if only_model:
        return
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{process}.pth" for process in range(processes)]
    # A run may go on in another number of processes; then nobody has its random state.
    kept = [name for name in states if (folder / name).is_file()] or ([] if any(folder.glob("rng_*")) else states[:1])
    for name in ("optimizer.pt", "scheduler.pt", *kept):
        _check_zip(folder / name)


def _check_zip(file: Path) -> None:
    """
    Raises:
        OutputError: not what `torch.save` writes: missing, cut off, or with a damaged part among the small ones.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if not any(part.filename.endswith("data.pkl") for part in parts):
                raise OutputError(f"{file.name} holds nothing that torch.save wrote")
            for part in parts:
                if part.file_size <= _SMALL:
                    archive.read(part)  # compares the checksum
    except FileNotFoundError:
        raise OutputError(f"there is no {file.name}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise OutputError(f"{file.name} is truncated or corrupt: {error}") from None
