"""A picture of the page that `finetune router report RUN --html` writes, taken by Chromium.

python scripts/router_figure.py outputs/tiny-mixtral-qlora-attention docs/router_report.png
python scripts/router_figure.py RUN docs/router_texts.png --only texts

RUN may be a page that was written before (.html). `scripts/test_browser.sh` installs what this needs.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH, SCALE = 1080, 2
MARGIN = 20
# The picture ends with this part of the page: the verdict, the load, and the curves over the steps.
LAST = ".steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--only", choices=("top", "curves", "drift", "texts", "all"), default="top", help="which part")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = arguments.run.resolve()
        if page.suffix != ".html":
            page = Path(folder) / "page.html"
            command = [sys.executable, "-m", "finetune", "router", "report", str(arguments.run), "--html", str(page)]
            reported = subprocess.run(command, stdout=subprocess.DEVNULL)
            if not page.exists():
                sys.exit(reported.returncode)
            # A picture is for readers elsewhere: paths as the repository has them.
            page.write_text(page.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")
        shoot(page, arguments.target, only=arguments.only, theme=arguments.theme)


def shoot(page: Path, target: Path, *, only: str, theme: str) -> None:
    """The page down to its curves over the steps (`top`), one of its parts, or all of it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium; scripts/test_browser.sh installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        size = {"width": WIDTH, "height": 800}
        opened = browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme=theme)  # type: ignore[arg-type]
        opened.goto(page.as_uri())
        if only == "all":
            opened.screenshot(path=target, full_page=True)
        elif only == "top":
            box = opened.locator(LAST).first.bounding_box()
            assert box is not None, "every page has curves over the steps"
            height = box["y"] + box["height"] + MARGIN
            opened.screenshot(path=target, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        else:
            opened.locator(f".{only}").first.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main()
