"""A picture of the page that `finetune data check RECIPE --html` writes, taken by Chromium.

python scripts/data_figure.py recipes/tiny-mixtral/qlora-attention.yaml docs/data_check.png
python scripts/data_figure.py RECIPE docs/data_examples.png --only examples

RECIPE may be a page that was written before (.html). `scripts/test_browser.sh` installs what this needs. A recipe whose
data is refused has a page as well.
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
SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--only", choices=("top", "examples", "all"), default="top", help="which part of the page")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = arguments.recipe.resolve()
        if page.suffix != ".html":
            page = Path(folder) / "page.html"
            command = [sys.executable, "-m", "finetune", "data", "check", str(arguments.recipe), "--html", str(page)]
            checked = subprocess.run(command, stdout=subprocess.DEVNULL)
            if not page.exists():
                sys.exit(checked.returncode)
            # A picture is for readers elsewhere: paths as the repository has them.
            page.write_text(page.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")
        shoot(page, arguments.target, only=arguments.only, theme=arguments.theme)


def shoot(page: Path, target: Path, *, only: str, theme: str) -> None:
    """The page down to the end of its first part (`top`), its first examples, or all of it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium; scripts/test_browser.sh installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        size = {"width": WIDTH, "height": 800}
        opened = browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme=theme)  # type: ignore[arg-type]
        opened.goto(page.as_uri())
        if only == "examples":
            opened.add_style_tag(content=f"article:nth-of-type(n+{SHOWN + 1}) {{ display: none }}")
            opened.locator(".examples").screenshot(path=target)
        elif only == "all":
            opened.screenshot(path=target, full_page=True)
        else:
            box = opened.locator(".part").first.bounding_box()
            assert box is not None, "every page has a part"
            height = box["y"] + box["height"] + MARGIN
            opened.screenshot(path=target, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        browser.close()


if __name__ == "__main__":
    main()
