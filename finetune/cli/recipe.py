"""`finetune recipe`: recipes in full, and their schema."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import CommandGroup, Debug, Json, Overrides, RecipePath
from finetune.cli.reporting import reporting
from finetune.recipe import bundled_recipes, copy_recipe, load_recipe, provenance, recipe_schema, resolved_yaml

recipe_app = CommandGroup("recipe", help="Look at recipes.")


@recipe_app.command("list")
def recipe_list(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come with the toolkit."""
    with reporting(as_json, debug) as report:
        recipes = bundled_recipes()
        for recipe in recipes:
            report.line(recipe.name)
            report.line(f"  {recipe.about}")
            report.line(f"  hardware: {recipe.hardware}")
        report.line("`finetune recipe copy NAME` writes one of them here, to be edited")
        report.finish({"recipes": [{**asdict(recipe), "path": str(recipe.path)} for recipe in recipes]})


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="As `finetune recipe list` shows it.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; the recipe's own name by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy a bundled recipe, to be edited."""
    with reporting(as_json, debug) as report:
        target = output or Path(name.split("/")[-1]).with_suffix(".yaml")
        copy_recipe(name, target)
        quoted = shlex.quote(str(target))
        report.line(f"{target}: edit `data`, then `finetune preflight {quoted}` and `finetune train {quoted}`")
        report.finish({"recipe": str(target)})


@recipe_app.command("show")
def recipe_show(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> None:
    """Print the fully resolved recipe, with package versions and the commit."""
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        if not as_json:
            about = provenance()
            for name, value in {**about["packages"], "python": about["python"], "git": about["git"]}.items():
                report.stdout.write(f"# {name}: {value}\n")
            report.stdout.write(resolved_yaml(loaded))
        report.finish({"recipe": loaded.model_dump(mode="json"), **provenance()})


@recipe_app.command("schema")
def recipe_show_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of recipes, for editors."""
    with reporting(True, debug) as report:
        report.finish(recipe_schema())
