"""What a message tells to install: never a package of our name, which an index gives to whoever takes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.errors import install_command
from tests.conftest import REPOSITORY

# As hatchling and setuptools write it.
METADATA = """Metadata-Version: 2.4
Name: moe-qlora
Version: 0.1.0
Requires-Dist: torch<2.14,>=2.10
Requires-Dist: gradio>=6.31; extra == 'ui'
Requires-Dist: uvicorn[standard]<0.60,>=0.50; extra == "ui"
Requires-Dist: fastapi>=0.160; extra == 'serve'
Requires-Dist: triton>=3.6; (sys_platform == 'linux') and extra == 'test'
"""


def test_a_checkout_installs_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert install_command("ui") == "pip install -e '.[ui]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("ui") == f"pip install -e '{REPOSITORY}[ui]'"


def test_a_wheel_installs_what_the_extra_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.errors._ROOT", tmp_path)
    (tmp_path / "moe_qlora-0.1.0.dist-info").mkdir()
    (tmp_path / "moe_qlora-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    assert install_command("ui") == "pip install 'gradio>=6.31' 'uvicorn[standard]<0.60,>=0.50'"
    assert install_command("test") == "pip install 'triton>=3.6'"


def test_nothing_names_our_package_to_an_index() -> None:
    files = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "scripts").iterdir()]
    files += [*(REPOSITORY / "finetune").rglob("*.py"), *(REPOSITORY / "recipes").rglob("*.yaml")]
    named = re.compile(r"pip install[^\n]*moe.qlora|moe-qlora\[")
    assert [file for file in files if file.is_file() and named.search(file.read_text(encoding="utf-8"))] == []
