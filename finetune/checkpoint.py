"""Looks at a model folder, or a run's checkpoint, before anything is loaded from it, and says in one message what is
wrong with it.

Only headers are read: a safetensors file begins with the length of a JSON header that places every tensor, so a
truncated shard shows in the file's size, without reading its gigabytes. What `torch.save` wrote is a zip archive, whose
directory is at its end and has a checksum for each of its parts; of those only the small ones are read.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.errors import FinetuneError, ModelError, OutputError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# A run's checkpoint: the last file that is written of one, and the one of the two that holds what was trained.
_STATE, _TRAINED = "trainer_state.json", ("adapter_model.safetensors", "non_moe.safetensors")
_SMALL = 2**20  # bytes of a part of a zip archive that is read
_EXPERT_WEIGHT = re.compile(r"(?P<layer>.+\.experts\.)(?P<expert>\d+)(?P<projection>\.\w+\.weight)")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, as its header states it; `start` is where in the file its bytes begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int


def read_json(path: Path, *, kind: type[FinetuneError] = ModelError) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FinetuneError: of the given kind, if the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise kind(
            f"there is no {path.name}", where=str(path.parent), fix="name a folder that transformers or peft saved"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise kind(f"{path.name} is not valid JSON: {error}", where=str(path), fix="copy the file again") from None
    if not isinstance(content, dict):
        raise kind(f"{path.name} does not hold a JSON object", where=str(path), fix="copy the file again")
    return content


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Checks config, index and every shard of a model folder; returns the parsed config.json.

    Raises:
        ModelError: no folder, no config, no safetensors, a missing, truncated or corrupt shard.
    """
    if not folder.is_dir():
        raise ModelError(
            f"the model folder {str(folder)!r} " + ("is a file" if folder.exists() else "does not exist"),
            where="model.path, or the command's argument",
            allowed="a folder with config.json and safetensors, or a hub id like mistralai/Mixtral-8x7B-v0.1",
            fix="check the path" + _nearby(folder),
        )
    config = read_json(folder / "config.json")
    for shard in shard_files(folder):
        check_safetensors(shard)
    return config


def shard_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: the single one if it is there, as transformers does, else those of its index.

    Raises:
        ModelError: no safetensors at all, an index that names no files, or names files that are missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(
                f"{_INDEX} names no shards",
                where=str(folder / _INDEX),
                allowed='"weight_map": {tensor: file, ...}',
                fix="copy the index again",
            )
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}",
                where=str(folder / _INDEX),
                fix="download or copy the missing files again",
            )
        return [folder / name for name in names]
    raise ModelError(
        "the folder holds no safetensors weights",
        where=str(folder),
        allowed=f"{_SINGLE} or {_INDEX} with its shards",
        fix="convert the checkpoint to safetensors, or name the folder that holds it",
    )


def require_every_expert(folder: Path, experts: int) -> None:
    """Checks that a checkpoint with one matrix an expert has those of every expert in every layer.

    Loading stacks whatever is there and then fails on a shape, far from the cause.

    Raises:
        ModelError: names the missing weights.
    """
    found = [_EXPERT_WEIGHT.fullmatch(info.name) for shard in shard_files(folder) for info in read_tensor_infos(shard)]
    names = {match.group(0) for match in found if match}
    layers = sorted({match["layer"] for match in found if match})
    projections = sorted({match["projection"] for match in found if match})
    wanted = [f"{la}{e}{pr}" for la in layers for e in range(experts) for pr in projections]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise incomplete(missing)


def incomplete(missing: list[str]) -> ModelError:
    """The error for weights that a checkpoint does not hold."""
    others = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return ModelError(
        f"{len(missing)} {'weight is' if len(missing) == 1 else 'weights are'} missing from the checkpoint",
        where=", ".join(missing[:4]) + others,
        fix="download the checkpoint again; a model with random weights in it would train and answer nonsense",
    )


def check_safetensors(file: Path, *, kind: type[FinetuneError] = ModelError) -> None:
    """Checks that a safetensors file has a whole header, as many bytes as the header places, and that the library
    that will read it accepts its dtypes, shapes and offsets.

    Raises:
        FinetuneError: of the given kind.
    """
    for _ in read_tensor_infos(file, kind=kind):
        pass
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _broken(file, f"corrupt: {error}", kind) from None


def read_tensor_infos(file: Path, *, kind: type[FinetuneError] = ModelError) -> Iterator[TensorInfo]:
    """The tensors that the file's header names.

    Raises:
        FinetuneError: of the given kind, if header or size are wrong.
    """
    size = file.stat().st_size

    def broken(what: str) -> FinetuneError:
        return _broken(file, what, kind)

    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise broken(f"truncated: {size} bytes are too few for a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if 8 + length > size:
            raise broken(f"truncated or corrupt: its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise broken("corrupt: its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken("corrupt: its header is not a JSON object")
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    try:
        expected = 8 + length + max((info["data_offsets"][1] for info in tensors.values()), default=0)
        infos = [
            TensorInfo(name, info["dtype"], tuple(info["shape"]), file, 8 + length + info["data_offsets"][0])
            for name, info in tensors.items()
        ]
    except (KeyError, TypeError, IndexError):
        raise broken("corrupt: its header does not place its tensors") from None
    if size != expected:
        raise broken(f"truncated or corrupt: {size} bytes where its header places {expected}")
    yield from infos


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


def _broken(file: Path, what: str, kind: type[FinetuneError]) -> FinetuneError:
    return kind(f"{file.name} is {what}", where=str(file), fix="download or copy the file again")


def _nearby(folder: Path) -> str:
    parent = folder.parent
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    return f"; {str(parent)!r} holds {', '.join(names[:8])}" if names else ""
