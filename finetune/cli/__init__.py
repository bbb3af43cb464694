"""The `finetune` command: thin subcommands over the rooms, errors as one message and exit status 2.

One file a group of commands. Heavy imports stand inside the subcommands, so that `--help` and a recipe's faults do not
wait for torch.
"""

from __future__ import annotations

import typer

from finetune.cli.bench import bench_app
from finetune.cli.data import data_app
from finetune.cli.evaluation import evaluate
from finetune.cli.export import adapter_app, merge, pull, push
from finetune.cli.inference import chat, generate, serve
from finetune.cli.init import init
from finetune.cli.recipe import recipe_app
from finetune.cli.router import router_app
from finetune.cli.training import preflight, quantize, train

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="QLoRA for Mixtral-class models whose experts really are 4-bit.",
)
# In the order of `--help`: from training to what is done with its result.
for command in (init, train, preflight, quantize, merge, evaluate, generate, chat, serve, push, pull):
    app.command()(command)
for group in (recipe_app, data_app, adapter_app, router_app, bench_app):
    app.add_typer(group)


def main() -> None:
    """Entry point of the console script."""
    app()
