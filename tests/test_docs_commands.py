"""The commands of README and docs/ run as printed, page by page, in a folder that looks like a checkout.

Blocks marked `bash` run; of blocks marked `sh`, which need a GPU, the hub or another program, the options of `finetune`
are checked. The pages share a folder in which `my.csv` lies, and the run that docs/router.md trains.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from finetune.cli import app
from tests.conftest import REPOSITORY
from tests.running import run_finetune

PAGES = (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")))
# What a checkout has that the commands name.
LINKS = ("recipes", "scripts", "accelerate_configs", "docs")
RUNS_OF_MY_CSV = ("outputs/my", "outputs/my-merged")
RUN = "outputs/tiny-mixtral-qlora-attention"  # that of docs/router.md, which other pages look at


def commands(page: Path, language: str) -> list[list[str]]:
    """The words of each command; comments and continued lines as the shell takes them."""
    text = page.read_text(encoding="utf-8")
    found = "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [words for line in found.splitlines() if (words := shlex.split(line, comments=True))]


def checked(words: list[str]) -> None:
    """Whether such a command and such options exist, without running it."""
    context = typer.main.get_command(app).make_context("finetune", words, resilient_parsing=True)
    command = context.command
    for word in words:
        group = getattr(command, "commands", {})
        if word in group:
            command = group[word]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert not [word for word in words if word.startswith("--") and word.partition("=")[0] not in known], words


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a checkout")
    for name in LINKS:
        (folder / name).symlink_to(REPOSITORY / name)
    with (folder / "my.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [("question", "answer"), *((f"Where is parcel {i}?", f"Parcel {i} is on its way.") for i in range(40))]
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def ran(checkout: Path) -> Iterator[Path]:
    """The checkout after the run at which several pages look."""
    (train,) = (words for words in commands(REPOSITORY / "docs" / "router.md", "bash") if words[1] == "train")
    before = Path.cwd()
    os.chdir(checkout)
    trained = run_finetune(*train[1:])
    assert trained.status == 0, trained.stderr
    assert Path(RUN).is_dir()
    yield checkout
    os.chdir(before)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "bash")], ids=lambda page: page.stem)
def test_the_commands_run(page: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ran)
    for made in ("my.yaml", *RUNS_OF_MY_CSV):  # each page begins anew
        shutil.rmtree(made, ignore_errors=True)
        Path(made).unlink(missing_ok=True)
    for index, words in enumerate(commands(page, "bash")):
        if page.stem == "router" and words[1] == "train":
            continue  # the fixture ran it
        monkeypatch.setattr(sys, "stdin", io.StringIO("Where is parcel 7?\n"))
        if words[0] == "finetune":
            done = run_finetune(*words[1:])
            status, said = done.status, done.stderr
        else:
            program = (
                [sys.executable, "-m", "accelerate.commands.accelerate_cli"] if words[0] == "accelerate" else words[:1]
            )
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            process = subprocess.run(
                [*program, *words[1:]], env=environment, capture_output=True, text=True, check=False
            )
            status, said = process.returncode, process.stderr
        assert status == 0, (index, shlex.join(words), said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_options_of_the_others_exist(page: Path) -> None:
    for words in commands(page, "sh"):
        if words[0] == "finetune":
            checked(words[1:])
        elif words[0].startswith("scripts/"):
            assert os.access(REPOSITORY / words[0], os.X_OK)


def test_a_wrong_option_is_noticed() -> None:
    checked(["merge", "adapter", "--output", "merged"])
    with pytest.raises(AssertionError):
        checked(["merge", "adapter", "--outptu", "merged"])
