"""`finetune router report`: the verdict on a run in the terminal, its page and its figures.

Leaves out: reading and judging the run (report.py), what stands on the page (report_page.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.console import Report
from finetune.data import counts, visible
from finetune.disk import write_text
from finetune.errors import OutputError
from finetune.router.plots import run_figures
from finetune.router.study.report import RouterReport, read_report
from finetune.router.study.report_page import render_report
from finetune.runfolder import RunFolder, run_of


def report_run(
    folder: Path, report: Report, *, html: Path | None = None, figures: Path | None = None
) -> dict[str, Any]:
    """Reads a run, says its verdict, and writes the page and the figures where they are wanted.

    Args:
        html: the page.
        figures: folder for the PNGs.

    Raises:
        OutputError: there is no run, it logged nothing of its routers, a file cannot be understood, or a target cannot
            be written.
    """
    made = read_report(folder)
    document = made.to_dict()
    if html is not None:
        with _writing(html):
            write_text(html, render_report(made))
        document["page"] = str(html)
    if figures is not None:
        with _writing(figures):
            figures.mkdir(parents=True, exist_ok=True)
        document["figures"] = [str(path) for path in run_figures(RunFolder(run_of(folder)), figures)]
    show_report(made, document, report)
    return document


def show_report(made: RouterReport, document: Mapping[str, Any], report: Report) -> None:
    """The verdict and its numbers."""
    report.line(f"{made.verdict.headline}. {made.verdict.sentence}")
    report.line(f"What to do: {made.verdict.advice}.")
    compared = document["compared"]
    if compared is not None:
        rows = [
            ("worst MaxVio", *(_shown(value) for value in compared["max_vio_worst"])),
            ("dead experts", *(f"{value}" for value in compared["dead_experts"])),
        ]
        tokens = "the same tokens" if compared["same_tokens"] else "not the same tokens"
        columns = ("what", compared["before"], compared["after"])
        report.table(f"Routing over {counts(made.last_step, 'step')} ({tokens})", columns, rows)
    if document["drift"] is not None:
        overlap = made.history.drift[-1].layers["overlap"]
        known = [value for value in overlap if value is not None]
        if known:
            report.line(
                f"choices that are the base's: {sum(known) / len(known):.1%}, {min(known):.1%} in the worst layer"
            )
    for alarm in made.history.alarms[-5:]:
        report.line(f"alarm at step {alarm.step}: {visible(alarm.message)}")
    for missing in made.missing:
        report.line(f"not in this run: {missing.what} ({missing.fix})")
    for name in ("page", "figures"):
        for path in [document[name]] if isinstance(document.get(name), str) else document.get(name, []):
            report.line(f"{name.removesuffix('s')}: {path}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """
    Raises:
        OutputError: the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the report cannot be written: {error.strerror}", where=str(path), fix="choose another place for it"
        ) from error


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
