"""Which software made an output: package versions, Python, platform and the commit of this code.

Saved beside every output together with the resolved recipe. Versions come from installed metadata and the commit
from `git`, so nothing heavy is imported. The commit is given only when the checkout around this file really
tracks it; a package installed into a folder that happens to lie in some repository has none.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "moe-qlora",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "triton",
    "liger-kernel",
    "numpy",
    "wandb",
)


def provenance() -> dict[str, Any]:
    """Versions by package (None: not installed), `python`, `platform` and `git` (see `git_state`)."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git": git_state(Path(__file__).resolve().parent.parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """`commit` of the checkout that tracks a folder, and `dirty`: whether files in the folder differ from it.

    None without git, without a commit, or when the folder is not part of a checkout.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    # At the root of some other tree a folder may be ignored, or new: then that commit says nothing about it.
    if commit is None or not _git(folder, "ls-files", "."):
        return None
    return {"commit": commit.strip(), "dirty": bool(_git(folder, "status", "--porcelain", "."))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    # A git hook exports GIT_DIR and the like, which would answer for its repository instead.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=30,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
