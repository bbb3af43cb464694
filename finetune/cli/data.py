"""`finetune data`: what a recipe's data teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import CommandGroup, Debug, Json, Overrides
from finetune.cli.reporting import reporting
from finetune.recipe import load_recipe, recipe_for_data

data_app = CommandGroup("data", help="Look at data.")


@data_app.command("check")
def data_check(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file (YAML); with --model, a data file, folder or hub id.", show_default=False)
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Check data without a recipe, as this model would read them (folder or hub id)."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many examples, with the supervised text in colour.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page.", show_default=False)] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write a corrected copy of the data to this new folder.", show_default=False)
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one GPU, for the cost.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report what data teach, before a GPU is touched; exit status 1 where training would refuse them."""
    with reporting(as_json, debug) as report:
        settings = overrides or ()
        loaded = load_recipe(recipe, settings) if model is None else recipe_for_data(recipe, model, settings)
        from finetune.data import check_data

        document = check_data(loaded, report, name=recipe, show=show, html=html, fix=fix, price_per_hour=price_per_hour)
        report.finish(document)
    if any(fault["level"] == "error" for fault in document["faults"]):
        raise typer.Exit(1)
