r"""A picture of one of our pages, taken by Chromium.

python scripts/page_figure.py data recipes/tiny-mixtral/qlora-attention.yaml docs/data_check.png
python scripts/page_figure.py data RECIPE docs/data_examples.png --only examples
python scripts/page_figure.py router outputs/tiny-mixtral-qlora-attention docs/router_report.png
python scripts/page_figure.py chat outputs/tiny-mixtral-qlora-attention/adapter docs/chat_page.png \
    --ask "write a python function"

A recipe or a run may be a page that was written before (.html); a recipe whose data is refused has a page as well.
`scripts/test_browser.sh` installs what this needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, SCALE = 1080, 2
MARGIN = 20
SHOWN = 6  # examples
# What writes a page, and the part that a picture ends with where it shows the page's top.
WRITES = {"data": (["data", "check"], ".part"), "router": (["router", "report"], ".steps")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("data", "router", "chat"))
    parser.add_argument("source", type=Path, help="recipe, run, or model")
    parser.add_argument("target", type=Path)
    parser.add_argument("--only", default="top", help="examples (of data), curves, drift, texts (of a run), or all")
    parser.add_argument("--ask", action="append", default=[], help="what the chat is asked; may be given several times")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    if arguments.page == "chat":
        shoot_chat(arguments.source, arguments.ask, arguments.target, theme=arguments.theme)
        return
    command, last = WRITES[arguments.page]
    with tempfile.TemporaryDirectory() as folder:
        file = written(command, arguments.source, Path(folder))
        with opened_page(arguments.theme) as page:
            page.goto(file.as_uri())
            if arguments.only == "all":
                page.screenshot(path=arguments.target, full_page=True)
            elif arguments.only == "top":
                box = page.locator(last).first.bounding_box()
                shown = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + MARGIN}
                page.screenshot(path=arguments.target, full_page=True, clip=shown)
            else:
                page.add_style_tag(content=f"article:nth-of-type(n+{SHOWN + 1}) {{ display: none }}")
                page.locator(f".{arguments.only}").first.screenshot(path=arguments.target)


def written(command: list[str], source: Path, folder: Path) -> Path:
    """The page of a recipe or a run."""
    if source.suffix == ".html":
        return source.resolve()
    page = folder / "page.html"
    arguments = [sys.executable, "-m", "finetune", *command, str(source), "--html", str(page)]
    status = subprocess.run(arguments, stdout=subprocess.DEVNULL).returncode
    if not page.exists():
        sys.exit(status)
    # A picture is for readers elsewhere: paths as the repository has them.
    page.write_text(page.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")
    return page


def shoot_chat(model: Path, questions: list[str], target: Path, *, theme: str) -> None:
    """The chat page once the last answer has its colours."""
    command = [sys.executable, "-m", "finetune", "chat", str(model), "--ui", "--port", "0"]
    command += ["--max-new-tokens", "48", "--repetition-penalty", "1.15"]  # a tiny model repeats itself
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        url = re.search(r"http://\S+", served.stdout.readline())
        if url is None:
            sys.exit(served.wait())
        try:
            with opened_page(theme) as page:
                page.goto(url[0])
                page.wait_for_selector("#left .chat")
                for number, question in enumerate(questions):
                    page.get_by_label("Question").fill(question)
                    page.get_by_role("button", name="Send").click()
                    page.locator("#left .assistant").nth(number).wait_for()
                    page.wait_for_function(
                        "[...document.querySelectorAll('button')].find(b => b.innerText == 'Stop').disabled"
                    )
                    page.wait_for_timeout(3000)  # the colours follow
                page.screenshot(path=target, full_page=True)
        finally:
            served.send_signal(signal.SIGINT)


@contextmanager
def opened_page(theme: Any) -> Iterator[Any]:
    """An empty page of a browser."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium; scripts/test_browser.sh installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        size: Any = {"width": WIDTH, "height": 800}
        yield browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme=theme)
        browser.close()


if __name__ == "__main__":
    main()
