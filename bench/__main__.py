"""`python -m bench NAME` from a checkout: a table of what was measured, then one JSON document.

`train` and `decode` are those of `finetune bench`, which is for anybody's machine; the others measure this repository:
what watching the routers costs, other stacks, the data path, single kernels, fewer bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.bench import bench_app, measuring
from finetune.cli.options import (
    Batch,
    CommandGroup,
    Debug,
    Device,
    Json,
    Length,
    Out,
    Overrides,
    RandomWeights,
    RecipePath,
    Shape,
    Steps,
)

app = CommandGroup("bench", help="Measure this repository.")
app.registered_commands += bench_app.registered_commands


@app.command("router")
def bench_router(
    recipe: RecipePath,
    overrides: Overrides = None,
    batch: Batch = None,
    length: Length = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of a turn.")] = 3,
    rounds: Annotated[int, typer.Option(min=2, help="Turns with the capture on, and as many off.")] = 8,
    random_weights: RandomWeights = False,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what watching the routers costs a training step."""
    with measuring(out, as_json, debug) as (report, document):
        from bench.router import bench_router as run

        document |= run(
            recipe,
            report,
            overrides=overrides or (),
            batch=batch,
            length=length,
            steps=steps,
            rounds=rounds,
            random_weights=random_weights,
        )


@app.command("peers")
def bench_peers(
    shape: Shape = None,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 1024,
    steps: Steps = 8,
    layers: Annotated[int, typer.Option(min=0, help="Measure so many layers and scale the time; 0 is all.")] = 0,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what one would train with instead, as far as it is installed."""
    with measuring(out, as_json, debug) as (report, document):
        from bench.peers import bench_peers as run

        document |= run(report, shape=shape, batch=batch, length=length, steps=steps, layers=layers)


@app.command("data")
def bench_data(
    rows: Annotated[int, typer.Option(min=1, help="Conversations to make, of about 400 tokens.")] = 100_000,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    source: Annotated[
        Path | None, typer.Option(help="Tokenize this file instead, and only that.", show_default=False)
    ] = None,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the data path beside bare tokenization."""
    with measuring(out, as_json, debug) as (report, document):
        from bench.data import bench_data as run

        document |= run(report, rows=rows, processes=processes, max_length=length, source=source)


@app.command("kernels")
def bench_kernels(
    shape: Shape = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a micro-batch; 1024, 2048 and 8192 by default.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure single kernels and one layer's experts, beside the copy rate."""
    with measuring(out, as_json, debug) as (report, document):
        from bench.kernels import TOKENS
        from bench.kernels import bench_kernels as run

        document |= run(report, shape=shape, tokens=tokens or TOKENS)


@app.command("experts")
def bench_experts(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, in 16 bits.", show_default=False)],
    data: Annotated[str, typer.Option(help="Held-out conversations.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what NF4, 3-bit and 2-bit experts lose against 16 bits on held-out text."""
    with measuring(out, as_json, debug) as (report, document):
        from bench.experts import bench_experts as run

        document |= run(model, report, data=data, rows=rows, device=device)


if __name__ == "__main__":
    app()
