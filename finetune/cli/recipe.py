"""`finetune recipe`: recipes in full, and their schema."""

from __future__ import annotations

import typer

from finetune.cli.options import Debug, Json, Overrides, RecipePath
from finetune.cli.reporting import reporting
from finetune.recipe import load_recipe, provenance, recipe_schema, resolved_yaml

recipe_app = typer.Typer(name="recipe", no_args_is_help=True, help="Look at recipes.")


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
