"""The page of the data check in a real browser: quiet, whole at both widths, readable in both themes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from finetune.data.check.page import render_page
from tests.browser.conftest import SIZES, Tab, fits
from tests.conftest import REPOSITORY
from tests.data.check.samples import HARD_EXAMPLES, INJECTED, SOUND_EXAMPLES, faulty, sound

DOCUMENTS = {"sound": (sound(), SOUND_EXAMPLES), "faulty": (faulty(), HARD_EXAMPLES)}


@pytest.fixture(scope="module", params=DOCUMENTS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(render_page(*DOCUMENTS[request.param]), encoding="utf-8")
    return path


@SIZES
def test_it_opens_quietly_and_fits(opened: Tab, file: Path):
    measured = fits(opened, file)
    document, _ = DOCUMENTS[file.stem]
    drawn = [part for part in document["parts"] if part["lengths"]["histogram"]]
    for heights, part in zip(measured["bars"], drawn, strict=True):
        rows = [each["rows"] for each in part["lengths"]["histogram"] if each["rows"]]
        tallest = max(range(len(rows)), key=rows.__getitem__)
        for height, number in zip(heights, rows, strict=True):
            assert height == pytest.approx(heights[tallest] * number / rows[tallest], abs=2)


def test_the_theme_changes_the_colours(browser: Any, file: Path):
    colours = set()
    for theme in ("light", "dark"):
        page = browser.new_page(color_scheme=theme)
        page.goto(file.as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(colours) == 2


def test_the_browser_shows_the_text_that_was_there(browser: Any, file: Path):
    page = browser.new_page()
    page.goto(file.as_uri())
    texts = page.eval_on_selector_all("article .text", "boxes => boxes.map(box => box.textContent)")
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    page.close()
    assert len(texts) == len(DOCUMENTS[file.stem][1])
    if file.stem == "faulty":
        assert sum(text.count(INJECTED) for text in texts) == 2
        assert "שלום עולם, مرحبا بالعالم, 日本語のテキスト" in texts[0]
        assert "lone\\ud800" in texts[0]


@pytest.mark.usefixtures("browser")  # skipped where there is none
def test_the_figure_of_a_page(tmp_path: Path):
    page, target = tmp_path / "page.html", tmp_path / "figure.png"
    page.write_text(render_page(sound(), SOUND_EXAMPLES), encoding="utf-8")
    for arguments, width, least, most in (([], 2160, 900, 2600), (["--only", "examples"], 2160, 200, 1600)):
        command = [sys.executable, "scripts/page_figure.py", "data", str(page), str(target), *arguments]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        height, across, _ = image.imread(target).shape
        assert width - 200 <= across <= width
        assert least < height <= most


def test_a_recipe_that_makes_no_page_is_said(tmp_path: Path):
    command = [
        sys.executable,
        "scripts/page_figure.py",
        "data",
        str(tmp_path / "none.yaml"),
        str(tmp_path / "figure.png"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert not (tmp_path / "figure.png").exists()
