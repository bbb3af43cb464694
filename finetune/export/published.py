"""Which files of a run may be published, and what they say there.

Why a list of names and not of exceptions: a run's folder also holds checkpoints with optimizer state and pickles, and
people put other things into it; what nobody thought of must stay. The files that do go name folders of this machine:
the base in `adapter_config.json`, `base.json`, `non_moe.json` and the header of `non_moe.safetensors`, data and output
in the recipe, adapters in `merge.json`. There every path becomes `./` and its last part; hub ids stay as they are.

Leaves out: the card (card.py), which is written for the repository, and the sending (hub.py).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import LORA_CONFIG, LORA_TENSORS, NON_MOE_CONFIG, NON_MOE_TENSORS, read_non_moe
from finetune.checkpoint import read_json, shard_files
from finetune.data import SUFFIXES, suffix_of
from finetune.errors import AdapterError, ModelError
from finetune.moe import BASE_FILE
from finetune.moe import is_local as is_path

_TOKENIZER = r"tokenizer\.(json|model)|(tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
_TOKENIZER += r"|chat_template\.jinja|chat_template\.json"
_ADAPTER = re.compile(
    "|".join([*map(re.escape, (LORA_CONFIG, LORA_TENSORS, NON_MOE_CONFIG, NON_MOE_TENSORS, BASE_FILE)), _TOKENIZER])
)
_MERGED = re.compile(
    r"(config|generation_config|fidelity|merge)\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    rf"|[\w.-]+\.gguf|Modelfile|SERVING\.md|{_TOKENIZER}"
)
# Of those, the files that are ours to write and may name folders.
_NAMES_PATHS = re.compile(
    rf"{re.escape(LORA_CONFIG)}|{re.escape(BASE_FILE)}|{re.escape(NON_MOE_CONFIG)}|(config|fidelity|merge)\.json"
)
_PATH = re.compile(r"(~|\.{1,2})?/\S.*", re.DOTALL)
_QUOTED_PATH = re.compile(r"`((?:~|\.{1,2})?/[^`\n]+)`")
_METADATA = "__metadata__"


def is_local(name: str) -> bool:
    """Whether a model or data set is a file or folder of this machine and not a hub id, which has at most one slash."""
    return is_path(name) or suffix_of(Path(name)) in SUFFIXES


def public_name(name: str) -> str:
    """A hub id as it is, a path by its last part only."""
    return f"./{Path(name).name}" if is_local(name) else name


def public_values(values: Any, *, names: tuple[str, ...] = ()) -> Any:
    """A JSON document with its paths by their last parts.

    Args:
        names: further texts that are paths although they do not look like one (`models/mixtral`).
    """
    if isinstance(values, Mapping):
        return {key: public_values(value, names=names) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [public_values(value, names=names) for value in values]
    if isinstance(values, str) and (values in names or _PATH.fullmatch(values)):
        return f"./{Path(values).name}"
    return values


def adapter_files(folder: Path, scratch: Path, *, base: str) -> dict[str, Path | bytes]:
    """What of an adapter folder goes, by name; files that named folders as they are to be there.

    Args:
        scratch: folder for copies of large files whose header must change.
        base: what the adapter calls its base.

    Raises:
        AdapterError: there is no adapter.
    """
    found = _chosen(folder, _ADAPTER, base)
    if not {LORA_TENSORS, NON_MOE_TENSORS} & set(found):
        raise AdapterError(
            "there is no adapter to push",
            where=str(folder),
            allowed="the folder of a run that has come to its end: its adapter/ holds what was trained",
            fix="name a run's output.dir; one that was cut off continues with `finetune train --resume`",
        )
    if NON_MOE_TENSORS in found and is_local(base):
        found[NON_MOE_TENSORS] = _with_public_header(folder / NON_MOE_TENSORS, scratch / NON_MOE_TENSORS, base)
    return found


def merged_files(folder: Path, *, base: str) -> dict[str, Path | bytes]:
    """What of a merged model's folder goes, by name.

    Raises:
        ModelError: there is no model, or a shard of it is missing or a link.
    """
    found = _chosen(folder, _MERGED, base) if folder.is_dir() else {}
    if not any(name.endswith((".safetensors", ".gguf")) for name in found):
        raise ModelError(
            "there is no merged model to push",
            where=str(folder),
            allowed="a folder that `finetune merge` wrote",
            fix="make it with `finetune merge RUN/adapter --output DIR`",
        )
    if not any(name.endswith(".gguf") for name in found):
        links = [shard.name for shard in shard_files(folder) if shard.name not in found]
        if links:
            raise ModelError(
                f"{len(links)} of the model's shards are links, and links are not followed: {links[0]}",
                where=str(folder),
                fix="put the files themselves into the folder",
            )
    return found


def _chosen(folder: Path, allowed: re.Pattern[str], base: str) -> dict[str, Path | bytes]:
    found: dict[str, Path | bytes] = {}
    names = (base,) if is_local(base) else ()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        # A link may lead to anything.
        if not allowed.fullmatch(path.name) or not path.is_file() or path.is_symlink():
            continue
        found[path.name] = path
        if _NAMES_PATHS.fullmatch(path.name):
            found[path.name] = (json.dumps(public_values(read_json(path), names=names), indent=2) + "\n").encode()
        elif path.suffix == ".md":
            text = path.read_text(encoding="utf-8", errors="replace")
            for name in names:
                text = text.replace(f"`{name}`", f"`{public_name(name)}`")
            found[path.name] = _QUOTED_PATH.sub(lambda match: f"`./{Path(match[1]).name}`", text).encode()
    return found


def _with_public_header(source: Path, target: Path, base: str) -> Path:
    """A copy of a non-MoE tuning whose metadata names no folder; the tensors are the same bytes.

    Raises:
        AdapterError: the file is damaged.
    """
    read_non_moe(source)  # checks header and metadata
    with source.open("rb") as old, target.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        header[_METADATA] = {
            key: json.dumps(public_values(json.loads(value), names=(base,))) if key == "non_moe" else value
            for key, value in header[_METADATA].items()
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, 1 << 24)
    return target
