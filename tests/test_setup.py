"""The set-up commands, with an interpreter that only pretends: what is installed, when, and what is said otherwise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Answers as `python3` does to the questions of _venv.sh, and writes down what pip is asked to do.
PRETENDER = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
  "-m pip") shift 2; echo "$*" >>"{log}"; exit {pip_status} ;;
  "-VV "*) echo "Python {version}" ;;
  "-c "*print*) echo "{version}" ;;
  "-c "*version_info*) [[ {version} > 3.10 ]] ;;
  "-c "*) exit 1 ;;
esac
"""


class Checkout:
    """A copy of what _venv.sh reads, and its log of pip calls."""

    def __init__(self, root: Path):
        self.root, self.log = root / "a checkout", root / "pip.log"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("scripts/_venv.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.log.touch()

    def start(self, *, version: str = "3.11", pip_status: int = 0) -> subprocess.CompletedProcess[str]:
        python = self.root.parent / f"python{version}-{pip_status}"
        python.write_text(PRETENDER.format(log=self.log, version=version, pip_status=pip_status))
        python.chmod(0o755)
        script = f'set -euo pipefail; source "{self.root}/scripts/_venv.sh"; ensure_venv; echo done'
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
        return subprocess.run(["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True)

    def pip_calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_start_installs_and_the_second_does_nothing(checkout: Checkout):
    first = checkout.start()
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        "making .venv with Python 3.11",
        "installing torch (the largest part; only the first time)",
        "installing moe-qlora and what it needs, as pinned in constraints.txt",
        "done",
    ]
    constraints = f"-c {checkout.root}/constraints.txt"
    assert checkout.pip_calls() == [
        f"install torch==2.13.0 {constraints}",
        f"install --quiet -e {checkout.root}[test] {constraints}",
    ]
    second = checkout.start()
    assert second.stdout.splitlines() == ["using .venv (installed, nothing changed)", "done"]
    assert len(checkout.pip_calls()) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(checkout: Checkout, name: str):
    checkout.start()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert "installing moe-qlora" in checkout.start().stdout
    assert "nothing changed" in checkout.start().stdout


def test_a_failed_installation_is_tried_again(checkout: Checkout):
    failed = checkout.start(pip_status=1)
    assert failed.returncode == 1
    assert "done" not in failed.stdout
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.start().returncode == 0


def test_an_old_or_a_missing_python_is_refused(checkout: Checkout):
    old = checkout.start(version="3.10")
    assert old.returncode == 2
    assert re.fullmatch(r"error: .* is Python 3\.10, and 3\.11 or newer is needed; set PYTHON=.*\n", old.stderr)
    script = f'source "{checkout.root}/scripts/_venv.sh"; ensure_venv'
    missing = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: there is no no-such-python; install Python 3.11 or newer")
    assert not (checkout.root / ".venv").exists()


def test_the_constraints_pin_releases_and_no_local_builds():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert {"torch==2.13.0", "transformers==5.23.0"} <= set(pins)
    assert not [pin for pin in pins if pin.startswith(("nvidia", "triton"))], "torch pins its own CUDA libraries"
