"""`finetune evaluate`: held-out conversations, or with --tasks the benchmarks of lm-evaluation-harness.

Benchmarks are options of `evaluate` and no command of their own: it is the same question, how good this model is, of
the same adapters and folders, and `--tasks` is what the harness itself calls them. The two kinds of options do not mix;
one that would be ignored is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import Base, Debug, Device, Json
from finetune.cli.reporting import reporting
from finetune.errors import FinetuneError

_HELD_OUT = "On held-out conversations"
_BENCHMARKS = "On benchmarks, by lm-evaluation-harness"
_OF_HELD_OUT = ("compare", "survival", "scale_to", "data", "max_rows", "seed")
_OF_BENCHMARKS = ("limit", "num_fewshot", "tasks_path", "batch_size", "apply_chat_template", "output")


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The reference: folder of a run, adapter or model.", show_default=False)],
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="`base`, a merged or other model, another adapter; several times.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    survival: Annotated[
        bool,
        typer.Option(
            "--survival",
            help="What each format keeps of the adapter's update; needs no data.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = False,
    scale_to: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="--survival: also for an update of this share of the weights' norm.",
            rich_help_panel=_HELD_OUT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Conversations; the run's held-out ones by default.", rich_help_panel=_HELD_OUT),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="How many of them.", rich_help_panel=_HELD_OUT)] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.", rich_help_panel=_HELD_OUT)] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks with commas: hellaswag,arc_easy.", rich_help_panel=_BENCHMARKS),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="N", help="Examples of each task; below 1 a share of them.", rich_help_panel=_BENCHMARKS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before each; the task's by default.", rich_help_panel=_BENCHMARKS),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(help="Folder of further tasks (YAML).", show_default=False, rich_help_panel=_BENCHMARKS),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="Requests at once, or auto.", rich_help_panel=_BENCHMARKS)
    ] = "8",
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Prompts as a user's turns of a chat.", rich_help_panel=_BENCHMARKS),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the JSON here as well.", show_default=False, rich_help_panel=_BENCHMARKS),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models on held-out conversations, with intervals, or score one on benchmarks with --tasks."""
    with reporting(as_json, debug) as report:
        _refuse(context, _OF_BENCHMARKS if tasks is None else _OF_HELD_OUT, with_tasks=tasks is not None)
        if tasks is not None:
            from finetune.evaluate import run_harness

            document = run_harness(
                model,
                report,
                tasks=tasks,
                limit=limit,
                num_fewshot=num_fewshot,
                tasks_path=tasks_path,
                batch_size=batch_size,
                chat_template=apply_chat_template,
                output=output,
                base=base,
                device=device,
            )
        else:
            from finetune.evaluate import run_evaluate

            document = run_evaluate(
                model,
                report,
                others=compare or (),
                survives=survival,
                scales=scale_to or (),
                data=data,
                max_rows=max_rows,
                seed=seed,
                base=base,
                device=device,
            )
        report.finish(document)


def _refuse(context: typer.Context, options: Sequence[str], *, with_tasks: bool) -> None:
    """Raises a FinetuneError where one of the options was given."""
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        instead = "run it apart, without --tasks" if with_tasks else "name tasks with --tasks"
        raise FinetuneError(
            f"{given[0]} {'does not go with' if with_tasks else 'belongs to'} --tasks",
            where="command line",
            allowed="benchmarks with --tasks, or held-out conversations without; see `finetune evaluate --help`",
            fix=f"leave {given[0]} out, or {instead}",
        )
