"""Debian's Chromium, driven by playwright; `scripts/test_browser.sh` installs both and starts these tests.

`--screenshots DIR` keeps a picture of every page, width and theme.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, default=None, metavar="DIR", help="keep pictures of the pages")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="scripts/test_browser.sh installs it")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; scripts/test_browser.sh installs it")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    folder: Path | None = request.config.getoption("--screenshots", default=None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
