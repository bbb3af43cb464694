"""`finetune router report`: did fine-tuning break the routing? A run folder read into one document, and judged.

What a run does not hold is listed with the recipe's key that would give it.

Leaves out: reading the metrics (router/history.py), the rules of the verdict (verdict.py), drawing (report_page.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint import read_json
from finetune.console import Report
from finetune.data import counts, visible
from finetune.errors import OutputError
from finetune.router.history import RouterHistory, read_history
from finetune.router.study.verdict import Comparison, Missing, Verdict, compare, find_missing, judge, setting, value_of
from finetune.runfolder import RunFolder, write_text


@dataclass(frozen=True)
class RouterReport:
    """All that the page shows of a run.

    Attributes:
        name: the folder.
        about: `run.json`: recipe, versions, commit.
        recipe_text: the resolved recipe.
        stopped_by: the message of the alarm that stopped the run.
    """

    name: str
    history: RouterHistory
    about: dict[str, Any]
    recipe_text: str
    stopped_by: str | None
    comparison: Comparison | None
    verdict: Verdict
    missing: list[Missing]

    @property
    def last_step(self) -> int:
        return max(step for step, _ in self.steps) if self.steps else 0

    @property
    def steps(self) -> list[tuple[int, float | None]]:
        windows = [(window.step, None) for window in (*self.history.train, *self.history.held_out)]
        return [*self.history.loss, *self.history.held_out_loss, *windows]

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        history, compared = self.history, self.comparison
        drift = history.drift[-1] if history.drift else None
        return {
            "run": self.name,
            "verdict": {
                "word": self.verdict.word,
                "headline": self.verdict.headline,
                "sentence": self.verdict.sentence,
            },
            "steps": self.last_step,
            "layers": history.layers,
            "experts": history.experts,
            "compared": None
            if compared is None
            else {
                "before": compared.before_name,
                "after": compared.after_name,
                "same_tokens": compared.same_tokens,
                "max_vio_worst": [
                    value_of(compared.before.worst("max_vio")),
                    value_of(compared.after.worst("max_vio")),
                ],
                "dead_experts": [len(compared.before.dead), len(compared.after.dead)],
            },
            "drift": None if drift is None else {"step": drift.step, **drift.layers},
            "alarms": [asdict(alarm) for alarm in history.alarms],
            "missing": [asdict(missing) for missing in self.missing],
        }


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
        from finetune.router.study.report_page import render_report

        _write(html, render_report(made))
        document["page"] = str(html)
    if figures is not None:
        from finetune.router.plots import run_figures

        require_folder(figures)
        document["figures"] = [str(path) for path in run_figures(RunFolder(folder), figures)]
    show_report(made, document, report)
    return document


def show_report(made: RouterReport, document: Mapping[str, Any], report: Report) -> None:
    """The verdict and its numbers."""
    report.line(f"{made.verdict.headline}. {made.verdict.sentence}")
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


def read_report(folder: Path) -> RouterReport:
    """Reads a run folder and judges it.

    Raises:
        OutputError: there is no run, it logged nothing of its routers, or a file cannot be understood.
    """
    run = RunFolder(folder)
    about = _read_run(run)
    if not run.metrics.is_file():
        raise OutputError(
            "this run has logged nothing yet",
            where=str(run.metrics),
            fix="wait for its first log (`training.logging_steps`)",
        )
    history = read_history(run)
    recipe = about["recipe"]
    if not history.has_router:
        logs = setting(recipe, "router.log", True)
        raise OutputError(
            "this run has no router metrics",
            where=str(run.metrics),
            allowed="a run with `router.log: true` that logged at least once",
            fix="wait for its first log (`training.logging_steps`)" if logs else "train with `router.log: true`",
        )
    summary = _read_json(run.root / "summary.json") if (run.root / "summary.json").is_file() else {}
    stopped = summary["stopped_by"] if "stopped_by" in summary else _stopped_by(history)
    compared = compare(history)
    recipe_text = run.recipe.read_text(encoding="utf-8", errors="replace") if run.recipe.is_file() else ""
    return RouterReport(
        name=str(folder),
        history=history,
        about=about,
        recipe_text=recipe_text,
        stopped_by=stopped,
        comparison=compared,
        verdict=judge(history, compared, recipe, stopped),
        missing=find_missing(history, recipe),
    )


def _stopped_by(history: RouterHistory) -> str | None:
    """The alarm that ended a run without a summary: nothing trained after it."""
    last = history.train[-1].step if history.train else 0
    return next((alarm.message for alarm in history.alarms if alarm.action == "stop" and alarm.step >= last), None)


def _read_run(run: RunFolder) -> dict[str, Any]:
    if not run.run_file.is_file():
        raise OutputError(
            "there is no run in this folder",
            where=str(run.root),
            allowed="a folder with a run.json, as `finetune train` makes it",
            fix="name the `output.dir` of a run",
        )
    about = _read_json(run.run_file)
    if not isinstance(about.get("recipe"), dict):
        raise _unreadable(run.run_file, "it holds no recipe")
    return about


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, kind=OutputError)
    except OutputError as error:
        raise _unreadable(path, error.what) from error


def _unreadable(path: Path, why: str) -> OutputError:
    return OutputError(
        f"a file of this run cannot be read: {why}",
        where=str(path),
        allowed="the file as `finetune train` wrote it",
        fix="restore the file, or report on another run",
    )


def require_folder(folder: Path) -> None:
    """Makes a folder for figures.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the report cannot be written: {error.strerror}", where=str(path), fix="choose another place for it"
    )


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
