"""`finetune merge`, `push`, `pull` and `adapter inspect`: what becomes of a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import Base, CommandGroup, Debug, Device, Json, Output
from finetune.cli.reporting import reporting


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run or of an adapter.", show_default=False)],
    output: Output,
    format: Annotated[str, typer.Option(help="nf4 (experts keep their bytes), bf16, fp16 or gguf.")] = "nf4",
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PATH=FACTOR", help="Add FACTOR of another adapter's update; several times."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Of ADAPTER's own update; 1 by default.")] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            help="trained: the 4-bit values; original: the base's 16 bits. By default what the adapter was trained on, "
            "and original where it does not say."
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The 16-bit checkpoint, where the trained base is a quantized folder.")
    ] = None,
    base: Base = None,
    data: Annotated[str | None, typer.Option(help="nf4: held-out conversations to compare on.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="nf4: how many of them; 0 compares nothing.")] = 64,
    shard_size: Annotated[str | None, typer.Option(help="Size of a file, 2GB by default; two are in memory.")] = None,
    attention: Annotated[str | None, typer.Option(help="nf4: its dtype, bf16 (default) or fp16.")] = None,
    gguf_type: Annotated[str | None, typer.Option(help="gguf: f16, q8_0 (default), q6_k, q4_k_m, ...")] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter: exactly in 4-bit experts and 16-bit attention, or as a checkpoint for other engines."""
    goes_on = "the same command goes on from what is there"
    with reporting(as_json, debug, goes_on=goes_on, unfinished=output) as report:
        from finetune.export import run_merge

        document = run_merge(
            adapter,
            report,
            output=output,
            format=format,
            others=others or (),
            factor=factor,
            onto=onto,
            original=original,
            base=base,
            data=data,
            rows=rows,
            shard_size=shard_size,
            gguf_type=gguf_type,
            attention=attention,
            device=device,
        )
        report.finish(document)


def push(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run (its output.dir) or of its adapter.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Option(help="Where to: name, or owner/name.", show_default=False)],
    merged: Annotated[
        Path | None, typer.Option(help="Push this merged model of the run instead of its adapter.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to write to; made where there is none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a run's adapter or merged model on the Hugging Face Hub, with a card."""
    with reporting(as_json, debug, goes_on="the same command goes on from what is there", hub_progress=True) as report:
        from finetune.export import Destination
        from finetune.export import push as send

        to = Destination(repo_id, private=private, branch=branch)
        report.finish(send(run, to, report, merged=merged, dry_run=dry_run))


def pull(
    repo_id: Annotated[str, typer.Argument(help="Adapter or model on the hub: owner/name.", show_default=False)],
    output: Output,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the default branch otherwise.")] = None,
    allow_unsafe: Annotated[
        bool, typer.Option("--allow-unsafe", help="Take pickle files and code too: they can do anything.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch an adapter or a model from the Hugging Face Hub: one commit, verified by hash, safetensors only."""
    goes_on = "the same command goes on from what is there"
    with reporting(as_json, debug, goes_on=goes_on, unfinished=output, hub_progress=True) as report:
        from finetune.export import pull as fetch

        pulled = fetch(repo_id, output, report, revision=revision, allow_unsafe=allow_unsafe)
        report.line(f"{pulled.repo_id} at {pulled.commit}, every hash as the commit names it, in {output}")
        report.finish({"output": str(output), **pulled.to_dict()})


adapter_app = CommandGroup("adapter", help="Look at adapters.")


@adapter_app.command("inspect")
def adapter_inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run, adapter or non-MoE tuning.", show_default=False)],
    base: Base = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter is: kind, rank, targets, base, recipe, data, and its norms layer by layer."""
    with reporting(as_json, debug) as report:
        from finetune.adapter import inspect_adapter, show_adapter

        document = inspect_adapter(adapter, base_path=base)
        show_adapter(document, report)
        report.finish(document)
