"""A model folder before anything is loaded from it: every file is looked at, and one message says what is wrong.

Only headers of the weights are read.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field

from finetune.checkpoint.headers import check_safetensors, read_tensor_infos
from finetune.checkpoint.json_file import read_json
from finetune.errors import ModelError
from finetune.values import FileSchema, check_object

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COPY = "copy the index again"
_EXPERT_WEIGHT = re.compile(r"(?P<layer>.+\.experts\.)(?P<expert>\d+)(?P<projection>\.\w+\.weight)")


class _Index(FileSchema):
    """`model.safetensors.index.json`: tensor to file. transformers does not read one without metadata."""

    metadata: dict[str, Any]
    weight_map: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=255)]], Field(min_length=1)]


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
            fix=_what_a_file_needs(folder) if folder.is_file() else "check the path" + _nearby(folder),
        )
    config = read_json(folder / "config.json")
    for shard in shard_files(folder):
        check_safetensors(shard)
    return config


def shard_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: the single one if it is there, as transformers does, else those of its index.

    Raises:
        ModelError: no safetensors at all, an index that names no files, or files that are missing or outside.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        weight_map = check_object(
            read_json(folder / _INDEX), _Index, kind=ModelError, name=_INDEX, where=str(folder / _INDEX), fix=_COPY
        ).weight_map
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not _stays_inside(name)]
        if outside:
            raise ModelError(
                f"{_INDEX} names files outside of its folder: {', '.join(outside[:3])}",
                where=str(folder / _INDEX),
                allowed="names of files beside the index",
                fix=_COPY,
            )
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
        fix=_instead_of_safetensors(folder),
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


def misshapen(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """The error for a weight of another shape than config.json gives it; [experts, out, in] where it is fused."""
    if len(found) == 3 and found[0] != expected[0]:
        what = f"the checkpoint holds {found[0]} of {expected[0]} experts"
    else:
        what = f"a weight of the checkpoint has the shape {list(found)}"
    return ModelError(
        what,
        where=where,
        allowed=f"{list(expected)} by config.json",
        fix="download the checkpoint again, or use the config.json that belongs to it",
    )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _what_a_file_needs(file: Path) -> str:
    if file.suffix == ".gguf":
        return "GGUF is not read here: name the folder of the original checkpoint, or answer with llama.cpp or Ollama"
    return f"name the folder that holds the model, as in {str(file.parent)!r}"


def _instead_of_safetensors(folder: Path) -> str:
    kinds = {file.suffix for file in folder.iterdir()}
    if ".gguf" in kinds:
        return "GGUF is not read here: use the original checkpoint in safetensors"
    if kinds & {".bin", ".pt", ".pth"}:
        return (
            "convert the checkpoint to safetensors: load it with transformers, where you trust who made it, and call "
            "save_pretrained"
        )
    return "download the weights as well, or name the folder that holds them"


def _nearby(folder: Path) -> str:
    parent = folder.parent
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    return f"; {str(parent)!r} holds {', '.join(names[:8])}" if names else ""
