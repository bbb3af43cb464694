"""`finetune router`: where tokens go, and what fine-tuning changed of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import Base, CommandGroup, Debug, Device, DocumentOut, Json, ProbeData, ProbeTokens, named
from finetune.cli.reporting import reporting

router_app = CommandGroup("router", help="Look at routers.")


@router_app.command("drift")
def router_drift(
    model: Annotated[
        Path, typer.Argument(help="Folder of a run or adapter, or a merged model with --base.", show_default=False)
    ],
    base: Annotated[str | None, typer.Option(callback=named, help="Base model; an adapter names its own.")] = None,
    data: ProbeData = None,
    max_tokens: ProbeTokens = 65_536,
    device: Device = "auto",
    out: DocumentOut = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far fine-tuning moved the routing from the base's, on the same text."""
    with reporting(as_json, debug) as report:
        from finetune.router import router_drift as run

        report.finish(run(model, report, base=base, data=data or (), max_tokens=max_tokens, device=device, out=out))


@router_app.command("analyze")
def router_analyze(
    model: Annotated[str, typer.Argument(help="Folder of a model, adapter or run; or hub id.", show_default=False)],
    base: Base = None,
    data: ProbeData = None,
    max_tokens: ProbeTokens = 65_536,
    device: Device = "auto",
    html: Annotated[Path | None, typer.Option(help="Write the study as one page.", show_default=False)] = None,
    out: DocumentOut = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Study the routing: load and repetition by kind of text, favourite tokens, pairs of experts, coloured text."""
    with reporting(as_json, debug) as report:
        from finetune.router import router_analyze as run

        document = run(
            model, report, base=base, data=data or (), max_tokens=max_tokens, device=device, html=html, out=out
        )
        report.finish(document)


@router_app.command("report")
def router_report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run (its output.dir) or of its adapter.", show_default=False)
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report as one page.", show_default=False)] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw the PNGs into this folder.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report what a run did to the routing: the verdict, load, curves against the base, drift, alarms."""
    with reporting(as_json, debug) as report:
        from finetune.router import report_run

        report.finish(report_run(run, report, html=html, figures=figures))
