"""Kernel logic without a GPU: triton's interpreter; and the plain path without triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    folder = REPOSITORY / "tests" / "kernels" / "interpreted"
    files = ("cases.py", "decode_cases.py", "expert_cache_cases.py", "low_bit_cases.py")
    cases = [str(folder / file) for file in files]
    command = [sys.executable, "-m", "pytest", *cases, "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_plain_path_without_triton() -> None:
    """The operators' own tests pass where triton cannot be imported."""
    program = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name.split('.')[0] == 'triton' else find(name, *rest)\n"
        "sys.modules['triton'] = None\n"
        "import pytest\n"
        "sys.exit(pytest.main(['tests/kernels/test_frozen_experts.py', '-q', '-x', '-k', 'bfloat16 or no_tokens',"
        " '-p', 'no:cacheprovider', '-o', 'addopts=']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
