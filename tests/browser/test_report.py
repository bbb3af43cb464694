"""The page of a run's routing in a real browser: quiet, whole at both widths, readable in both themes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from finetune.router.study.report import read_report
from finetune.router.study.report_page import render_report
from tests.browser.conftest import SIZES, Tab, fits
from tests.conftest import REPOSITORY
from tests.router.study.runs import HARD, alarm, collapsing, write_run

RUNS: dict[str, dict[str, Any]] = {
    "report-healthy": {},
    "report-collapsing": {
        "layers": 32,
        "load": collapsing(8, 17, 100),
        "alarms": [alarm(step, 17, kind="dead_expert", expert=7) for step in (60, 80)] + [alarm(90, 3, action="stop")],
    },
    "report-sixteen": {"layers": 12, "experts": 16, "top_k": 4},
    "report-large": {"layers": 48, "experts": 128, "top_k": 8, "steps": tuple(range(10, 3010, 10))},
    "report-bare": {"steps": (2,), "evaluations": (), "base": False},
}
OPEN_ALL = "document.querySelectorAll('details').forEach(details => { details.open = true })"


@pytest.fixture(scope="module", params=RUNS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = folder / f"{request.param}.html"
    path.write_text(render_report(read_report(write_run(folder / "run", **RUNS[request.param]))), encoding="utf-8")
    return path


@SIZES
def test_it_opens_quietly_and_fits(opened: Tab, file: Path):
    page = opened[0]
    page.evaluate(OPEN_ALL)
    fits(opened, file)
    assert page.evaluate("document.scripts.length") == 0
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert page.evaluate(broken) == 0


@SIZES
def test_the_answer_is_on_the_first_screen(opened: Tab):
    page, _, _ = opened
    for selector in ("h1", ".tile"):
        box = page.locator(selector).first.bounding_box()
        assert box["y"] + box["height"] <= 900


def test_cells_lie_on_their_pixels(browser: Any, file: Path):
    """A cell that is pointed at is the one whose colour is under the pointer, and its hint is what is found there."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(file.as_uri())
    drawn = page.eval_on_selector_all(
        "svg.drawn",
        """drawings => drawings.map(drawing => {
            const box = (node) => {
                const {left, right, top, bottom} = node.getBoundingClientRect();
                return [left, right, top, bottom];
            };
            const cells = [...drawing.querySelectorAll('.hints rect')];
            const images = [...drawing.querySelectorAll('image')];
            return [images.map(box), cells.map(box), cells.map(cell => cell.textContent)];
        }).filter(([images]) => images.length)""",
    )
    for images, cells, texts in drawn:
        at = {text: box for text, box in zip(texts, cells, strict=True) if text.startswith("layer 0, expert 0")}
        first = next(iter(at.values()), None)
        if first is not None:  # it begins where a picture does
            assert min(abs(first[0] - image[0]) + abs(first[2] - image[2]) for image in images) < 2
        for left, right, top, bottom in cells:
            assert right > left
            assert bottom > top
            assert any(
                image[0] - 1 <= left and right <= image[1] + 1 and image[2] - 1 <= top and bottom <= image[3] + 1
                for image in images
            )
    page.close()


def test_the_browser_shows_the_text_that_was_there(browser: Any, file: Path):
    page = browser.new_page()
    page.goto(file.as_uri())
    texts = page.eval_on_selector_all(".coloured", "boxes => boxes.map(box => box.textContent)")
    page.close()
    hard = "".join(HARD).replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert [text for text in texts if text.startswith("<s> 1 <")] == [hard] * (len(texts) // 2)


@pytest.mark.usefixtures("browser")  # skipped where there is none
def test_the_figure_of_a_run(tmp_path: Path):
    target = tmp_path / "figure.png"
    command = [sys.executable, "scripts/page_figure.py", "router", str(write_run(tmp_path / "run")), str(target)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    height, across, _ = image.imread(target).shape
    assert across == 2160
    assert 1200 < height < 5000


def test_a_folder_that_is_no_run_is_said(tmp_path: Path):
    command = [sys.executable, "scripts/page_figure.py", "router", str(tmp_path / "none"), str(tmp_path / "figure.png")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no run in this folder" in done.stderr
    assert not (tmp_path / "figure.png").exists()
