"""A run folder read into one document, and judged: did fine-tuning break the routing?

What a run does not hold is listed with the recipe's key that would give it.

Leaves out: reading the metrics (router/history.py), the rules of the verdict (verdict.py), what is shown
(report_command.py, report_page.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint import read_json
from finetune.errors import OutputError
from finetune.router.history import RouterHistory, read_history
from finetune.router.study.verdict import Comparison, Missing, Verdict, compare, find_missing, judge, setting, value_of
from finetune.runfolder import RunFolder, run_of


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
                "advice": self.verdict.advice,
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


def read_report(folder: Path) -> RouterReport:
    """Reads a run folder and judges it.

    Raises:
        OutputError: there is no run, it logged nothing of its routers, or a file cannot be understood.
    """
    run = RunFolder(run_of(folder))
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
        verdict=judge(history, compared, recipe, stopped, str(folder)),
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
