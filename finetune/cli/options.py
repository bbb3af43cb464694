"""Groups of commands, and the options and arguments that several commands take: they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

# ---- groups: click's own classes, which typer holds a copy of, have no public name ----------------------------


def _untyped(params: list[Any]) -> list[Any]:
    """The parameters with flags that show no `<bool>`: there is no value to give."""
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag:
            param.metavar = ""
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))


class CommandGroup(typer.Typer):
    """A command line or a group of its commands: `-h` is help, errors are not drawn as frames of code."""

    def __init__(self, name: str, *, help: str, add_completion: bool = False):
        super().__init__(
            name=name,
            cls=_Group,
            help=help,
            no_args_is_help=True,
            add_completion=add_completion,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": _Command, **settings})


RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML), or the folder of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. training.max_steps=10.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, logs elsewhere.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Only the shape of the model, without a checkpoint: to measure speed.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ResidencyOption = Annotated[
    str, typer.Option("--residency", help="Where the experts live: resident, offload (host memory), or auto.")
]


def sane_size(value: float | None) -> float | None:
    """Refuses what is no size, before it is made a number of bytes: NaN passes every bound."""
    if value is not None and not 0 < value <= 1_000_000:
        raise typer.BadParameter(f"{value} is no size; give a number above 0 and of at most 1,000,000")
    return value


def named(value: str | None) -> str | None:
    """Refuses an empty name, as a variable of the shell that is not set leaves it."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty; name a folder or hub id, or leave --base out")
    return value


Base = Annotated[
    str | None, typer.Option(callback=named, help="Base of an adapter, if it has moved or is not recorded.")
]
DeviceGib = Annotated[
    float | None,
    typer.Option(
        "--device-gib", min=0.1, callback=sane_size, help="How much of the GPU to use; what is free by default."
    ),
]
RoutingFile = Annotated[
    Path | None,
    typer.Option("--routing", help="RUN/router/base.json: offloaded, its hottest experts stay.", show_default=False),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Rows of a micro-batch; the recipe's by default.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a row; the recipe's by default.")]
Steps = Annotated[int, typer.Option(min=1, help="Measured steps, after three of warm-up.")]
Shape = Annotated[
    Path | None, typer.Option(help="Folder with a config.json; Mixtral 8x7B's by default.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", help="Append the JSON line to this file.", show_default=False)]
ProbeData = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="Text to read, may be given several times; bundled text by default."),
]
ProbeTokens = Annotated[int, typer.Option(min=1, help="Tokens to read at most, evenly from each kind of text.")]
DocumentOut = Annotated[Path | None, typer.Option("--out", help="Write the JSON here as well.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", help="Folder to write; must be new or empty.", show_default=False)]
