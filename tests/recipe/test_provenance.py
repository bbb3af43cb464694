"""What an output says about the software that made it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import pytest

from finetune.recipe.origin import git_state, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_versions_and_platform() -> None:
    made_by = provenance()
    assert made_by["python"] == platform.python_version()
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"):
        assert made_by["packages"][name] == importlib.metadata.version(name)
    assert json.loads(json.dumps(made_by)) == made_by


def test_a_clean_checkout(checkout: Path) -> None:
    assert git_state(checkout / "package") == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


def test_only_changes_in_the_folder_make_it_dirty(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("mine")
    assert git_state(checkout / "package") == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    (checkout / "package" / "new.py").write_text("2")
    assert git_state(checkout / "package") == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": True}
    (checkout / "package" / "new.py").unlink()
    (checkout / "package" / "a.py").write_text("changed")
    assert git_state(checkout / "package") == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": True}


def test_a_package_that_the_checkout_does_not_track_has_no_commit(checkout: Path) -> None:
    installed = checkout / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("1")
    assert git_state(installed) is None


def test_no_checkout_no_commit_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_the_repository_of_a_git_hook_does_not_answer_for_another(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git_state(checkout / "package")
    monkeypatch.setenv("GIT_DIR", str(tmp_path_factory.mktemp("other") / ".git"))
    assert git_state(checkout / "package") == expected
