"""Debian's Chromium, driven by playwright; `scripts/test_browser.sh` installs both and starts these tests.

`--screenshots DIR` keeps a picture of every page, width and theme.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")
_SIZES = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
SIZES = pytest.mark.parametrize("opened", _SIZES, ids=lambda at: f"{at[0]}-{at[1]}", indirect=True)
Tab = tuple[Any, list[str], list[str]]  # a page, what it said to the console, what it asked for


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


@contextmanager
def opened_tab(browser: Any, url: str, width: int, theme: str) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(url)
    yield page, said, asked
    page.close()


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, file: Path, screenshots: Path | None) -> Iterator[Tab]:
    """The page of the module's `file` at one width and theme."""
    width, theme = getattr(request, "param", (1280, "light"))
    with opened_tab(browser, file.as_uri(), width, theme) as tab:
        if screenshots is not None:
            tab[0].screenshot(path=screenshots / f"{file.stem}-{width}-{theme}.png", full_page=True)
        yield tab


def fits(tab: Tab, file: Path) -> dict[str, Any]:
    """What `measure.js` measured on a page that said nothing, asked for nothing but itself, and shows all it has."""
    page, said, asked = tab
    measured: dict[str, Any] = page.evaluate(MEASURE)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert measured["width"] <= measured["window"]
    assert measured["outside"] == []
    assert measured["covered"] == []
    assert measured["faint"] == []
    return measured
