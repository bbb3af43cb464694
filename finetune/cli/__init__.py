"""The `finetune` command: thin subcommands over the rooms, errors as one message and exit status 2.

One file a group of commands. Heavy imports stand inside the subcommands, so that `--help` and a recipe's faults do not
wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.bench import bench_app
from finetune.cli.data import data_app
from finetune.cli.evaluation import evaluate
from finetune.cli.export import adapter_app, merge, pull, push
from finetune.cli.inference import chat, generate, serve
from finetune.cli.init import init
from finetune.cli.options import CommandGroup
from finetune.cli.recipe import recipe_app
from finetune.cli.router import router_app
from finetune.cli.training import preflight, quantize, train
from finetune.recipe import provenance

_VERSIONED = ("moe-qlora", "torch", "transformers", "bitsandbytes")

app = CommandGroup(
    "finetune", help="QLoRA for Mixtral-class models whose experts really are 4-bit.", add_completion=True
)


def _show_versions(wanted: bool) -> None:
    if wanted:
        versions = provenance()["packages"]
        typer.echo(", ".join(f"{name} {versions[name]}" for name in _VERSIONED))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


# In the order of `--help`: from training to what is done with its result.
for command in (init, train, preflight, quantize, merge, evaluate, generate, chat, serve, push, pull):
    app.command()(command)
for group in (recipe_app, data_app, adapter_app, router_app, bench_app):
    app.add_typer(group)


def main() -> None:
    """Entry point of the console script."""
    app()
