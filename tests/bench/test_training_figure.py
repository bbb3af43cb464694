"""The README's picture is drawn from the recorded lines by the command that bench/results names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from matplotlib import image

from tests.conftest import REPOSITORY


def test_the_figure(tmp_path: Path) -> None:
    target = tmp_path / "training.png"
    command = [sys.executable, "scripts/training_figure.py", "bench/results/h100-80gb", str(target)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    height, width, _ = image.imread(target).shape
    assert width > height > 400
