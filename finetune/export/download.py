"""Fetches an adapter or a model from the hub: one commit, verified by hash, nothing in it that runs code.

Why: a branch moves, so the revision is resolved to its commit first, and the commit is what is recorded. A download is
checked by size only, so that the client's own verification follows: every file by the hash that the commit names,
SHA-256 for large files and git's blob id for the others. A pickle runs code when it is read, and `auto_map` runs Python
files of the repository; the formats kept here hold data only. Other files are left out, and a repository that is of no
use without them is refused.

How: files go into a hidden folder beside the output that carries the commit in its name, JSON first, since a config may
be refused before gigabytes come. The folder stays when the connection breaks, and the next pull takes the files that
are missing; whole and verified, it becomes the output by one rename. The client resumes inside of a file while it runs;
a file that a kill has cut it begins anew.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.hf_api import RepoFile

from finetune.checkpoint import check_safetensors, read_json
from finetune.console import Report, gib
from finetune.disk import require_fresh, require_space, write_json
from finetune.errors import HubError
from finetune.export.hub import Hub, require_repo_id

PULLED_FILE = "pulled.json"
# Formats that hold data and nothing else.
_SAFE = re.compile(
    r".+\.(safetensors|gguf|json|jsonl|jinja|model|txt|md|yaml|yml|csv|png|jpg|svg)|\.gitattributes|LICEN[CS]E.*|NOTICE.*"
    r"|Modelfile",
    re.IGNORECASE,
)
_WEIGHTS = re.compile(r".+\.(safetensors|gguf)")
_CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines")


@dataclass(frozen=True)
class Pulled:
    """What was fetched: the commit, the files that came, and those that were left out."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "commit": self.commit,
            "files": list(self.files),
            "left_out": list(self.left_out),
            "bytes": self.bytes,
        }


def pull(
    repo_id: str,
    output: Path,
    report: Report,
    *,
    revision: str | None = None,
    allow_unsafe: bool = False,
) -> Pulled:
    """Fetches a model repository into `output`, whole or not at all.

    Args:
        revision: branch, tag or commit; the default branch when None.
        allow_unsafe: pickle files and code come too.

    Raises:
        HubError: no such repository or revision, no right to read it, no connection, a file that is not what its hash
            says, or a repository that is of no use without pickle files or code.
        OutputError: `output` holds something, or the disk has no room.
    """
    require_repo_id(repo_id)
    require_fresh(output)
    hub = Hub(report)
    info = hub.ask("find the revision", repo_id, partial(hub.api.model_info, repo_id, revision=revision))
    commit = str(info.sha)
    listed = hub.ask(
        "list the files", repo_id, lambda: list(hub.api.list_repo_tree(repo_id, recursive=True, revision=commit))
    )
    every = [file for file in listed if isinstance(file, RepoFile)]
    wanted = [file for file in every if allow_unsafe or _SAFE.fullmatch(PurePosixPath(file.path).name)]
    left_out = sorted({file.path for file in every} - {file.path for file in wanted})
    _require_weights(wanted, left_out, repo_id)
    total = sum(file.size for file in wanted)
    # Hidden, beside the output: on the same disk, and of this commit only.
    partial_folder = output.absolute().parent / f".{output.name}.{commit[:12]}.partial"
    here = sum(file.stat().st_size for file in partial_folder.rglob("*") if file.is_file())
    require_space(output, total - here, what=f"{repo_id} at {commit[:12]}")
    report.line(f"Pulling {repo_id} at {commit}: {len(wanted)} files, {gib(total)}")
    for path in left_out:
        report.line(f"left out: {path} (may run code when it is read)")
    paths = [file.path for file in wanted]
    configs = [path for path in paths if path.endswith(".json")]
    _fetch(hub, repo_id, configs, commit, partial_folder)
    for path in configs if not allow_unsafe else ():
        _require_no_code(partial_folder / path, repo_id, partial_folder)
    _fetch(hub, repo_id, paths, commit, partial_folder)
    for path in paths:
        if path.endswith(".safetensors"):
            check_safetensors(partial_folder / path, kind=HubError)
    pulled = Pulled(repo_id, commit, tuple(sorted(paths)), tuple(left_out), total)
    # SHA-256 of a large file, git's blob id of another.
    hashes = {file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in wanted}
    write_json(
        partial_folder / PULLED_FILE, {"repo_id": repo_id, "revision": revision, "commit": commit, "files": hashes}
    )
    shutil.rmtree(partial_folder / ".cache")  # the client's notes on its downloads
    if output.is_dir():
        output.rmdir()  # empty, as was checked
    os.replace(partial_folder, output)
    return pulled


def _fetch(hub: Hub, repo_id: str, paths: Sequence[str], commit: str, folder: Path) -> None:
    """Downloads what is missing of these files, and compares their hashes; a file with a wrong one is deleted."""
    for path in paths:
        if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute():
            raise HubError(f"{path!r} would lie outside of the output folder", where=repo_id, fix="do not use it")
    if not paths:
        return
    patterns = list(map(glob.escape, paths))
    download = partial(hub.api.snapshot_download, repo_id, allow_patterns=patterns, revision=commit, local_dir=folder)
    hub.ask("download the files", repo_id, download)
    verify = partial(hub.api.verify_repo_checksums, repo_id, revision=commit, local_dir=folder)
    found = hub.ask("compare the hashes", repo_id, verify)
    wrong = [file for file in found.mismatches if file["path"] in paths]
    for file in wrong:
        (folder / file["path"]).unlink()
    if wrong:
        path, actual, expected = (wrong[0][key] for key in ("path", "actual", "expected"))
        raise HubError(
            f"{path} is not what the commit names: its hash is {actual[:12]}, not {expected[:12]}",
            where=f"{repo_id} at {commit}",
            fix="run the same command again: only what is wrong is fetched anew",
        )
    if missing := sorted({*paths} & {*found.missing_paths}):
        raise HubError(f"{missing[0]} did not come", where=f"{repo_id} at {commit}", fix="run the same command again")


def _require_weights(wanted: Sequence[RepoFile], left_out: Sequence[str], repo_id: str) -> None:
    if any(_WEIGHTS.fullmatch(file.path) for file in wanted):
        return
    if left_out:
        raise HubError(
            f"the repository has no safetensors weights; {', '.join(left_out[:3])} may run code when read",
            where=repo_id,
            allowed="safetensors (or GGUF)",
            fix="ask its owner for safetensors, or take everything with --allow-unsafe if you trust them",
        )
    raise HubError("the repository holds no weights", where=repo_id, fix="check the name and the --revision")


def _require_no_code(path: Path, repo_id: str, folder: Path) -> None:
    """Refuses a config that makes transformers or peft import code."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        return
    keys = [key for key in _CODE_KEYS if _names_code(read_json(path, kind=HubError).get(key))]
    if keys:
        shutil.rmtree(folder)
        raise HubError(
            f"{path.name} names code of the repository to run ({', '.join(keys)})",
            where=repo_id,
            fix="use a checkpoint of an architecture that transformers knows, or --allow-unsafe if you trust its owner",
        )


def _names_code(value: Any) -> bool:
    # PEFT writes the base's class here when it is given no task; that runs nothing of the repository.
    return bool(value) and not (isinstance(value, Mapping) and "parent_library" in value)
