"""The `finetune` command: thin subcommands over the rooms, errors as one message and exit status 2.

Heavy imports stand inside the subcommands, so that `--help` and a recipe's faults do not wait for torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from finetune.console import Report, gib
from finetune.errors import FinetuneError
from finetune.recipe import load_recipe, provenance, recipe_schema, resolved_yaml
from finetune.runfolder import full_disk_explained

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="QLoRA for Mixtral-class models whose experts really are 4-bit.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="Look at recipes.")
app.add_typer(recipe_app, name="recipe")
data_app = typer.Typer(no_args_is_help=True, help="Look at data.")
app.add_typer(data_app, name="data")
adapter_app = typer.Typer(no_args_is_help=True, help="Look at adapters.")
app.add_typer(adapter_app, name="adapter")
router_app = typer.Typer(no_args_is_help=True, help="Look at routers.")
app.add_typer(router_app, name="router")
bench_app = typer.Typer(no_args_is_help=True, help="Measure: training, what others would do, kernels.")
app.add_typer(bench_app, name="bench")

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. training.max_steps=10.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, logs elsewhere.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ResidencyOption = Annotated[
    str, typer.Option("--residency", help="Where the experts live: resident, offload (host memory), or auto.")
]
DeviceGib = Annotated[
    float | None, typer.Option("--device-gib", min=0.1, help="How much of the GPU to use; what is free by default.")
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


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in output.dir.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in output.dir.")] = False,
    random_weights: Annotated[bool, typer.Option(help="Only the shape of the model: to measure speed.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune by a recipe; exit status 1 where an alarm stopped it."""
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        quiet_libraries(debug)
        from finetune.train import train as run

        summary = run(loaded, report, resume=resume, overwrite=overwrite, random_weights=random_weights)
        if summary:
            report.finish(summary)
    if summary and summary["stopped_by"] is not None:
        raise typer.Exit(1)


@app.command()
def preflight(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu_gib: Annotated[float | None, typer.Option(help="Estimate for a GPU of this size, at hand or not.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate the device memory of a recipe, without a GPU and without weights."""
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        quiet_libraries(debug)
        from torch import device as torch_device

        from finetune.model import resolve_device
        from finetune.preflight import preflight as run
        from finetune.preflight import show_memory

        bytes_given = None if gpu_gib is None else int(gpu_gib * 2**30)
        device = torch_device("cuda") if gpu_gib is not None else resolve_device(loaded.model.device)
        memory = run(loaded, device, device_bytes=bytes_given)
        show_memory(memory, report)
        report.finish(memory.to_dict())


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.", show_default=False)],
    output: Output,
    attention: Annotated[str, typer.Option(help="nf4 or 16bit.")] = "nf4",
    experts: Annotated[str, typer.Option(help="nf4, or hqq3 or hqq2: 3 or 2 bits, to answer only.")] = "nf4",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model once; the folder then loads without quantizing again."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.export.quantized import write_quantized

        census = write_quantized(model, output, attention=attention, experts=experts, revision=revision, device=device)
        rows = [(row.role, row.dtype, gib(row.bytes)) for row in census.rows]
        report.table(f"Quantized model in {output}", ("role", "dtype", "size"), rows)
        report.finish({"output": str(output), **census.to_dict()})


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that a run saved.", show_default=False)],
    output: Output,
    format: Annotated[str, typer.Option(help="nf4 (experts keep their bytes), bf16, fp16 or gguf.")] = "nf4",
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PATH=FACTOR", help="Add FACTOR of another adapter's update; several times."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Of ADAPTER's own update; 1 by default.")] = None,
    onto: Annotated[str, typer.Option(help="trained: the 4-bit values; original: the base's 16 bits.")] = "trained",
    original: Annotated[
        str | None, typer.Option(help="The 16-bit checkpoint, where the trained base is a quantized folder.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved since training.")] = None,
    data: Annotated[str | None, typer.Option(help="nf4: held-out conversations to compare on.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="nf4: how many of them.")] = 64,
    shard_size: Annotated[str | None, typer.Option(help="bf16, fp16: of a file; 4GB by default.")] = None,
    gguf_type: Annotated[str | None, typer.Option(help="gguf: f16, q8_0 (default), q6_k, q4_k_m, ...")] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter: exactly in 4-bit experts and 16-bit attention, or as a checkpoint for other engines."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.export.command import run_merge

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
            device=device,
        )
        report.finish(document)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="The reference: adapter or model folder.", show_default=False)],
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="OTHER", help="`base`, a merged or other model, another adapter; several times."),
    ] = None,
    survival: Annotated[
        bool, typer.Option("--survival", help="What each format keeps of the adapter's update; needs no data.")
    ] = False,
    scale_to: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="--survival: also for an update of this share of the weights' norm."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Conversations; the run's held-out ones by default.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved since training.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models on held-out conversations: loss, and how far others are from the first, with intervals."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.evaluation.command import run_evaluate

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


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to ask; may be given several times.")],
    against: Annotated[str | None, typer.Option(help="Another model to answer the same, side by side.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved since training.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option(help="Continue the text as it stands, without the chat template.")] = False,
    residency: ResidencyOption = "auto",
    device_gib: DeviceGib = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer prompts, streamed."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.infer.engine import Engine
        from finetune.infer.generate import generate as answer
        from finetune.infer.request import Sampling
        from finetune.infer.settings import EngineSettings

        sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed)
        stdout = report.stdout
        one_row = EngineSettings(
            max_batch=1,
            residency=residency,  # type: ignore[arg-type]  # checked by the engine
            device_gib=device_gib,
        )

        def stream(text: str) -> None:
            stdout.write(text)
            stdout.flush()

        streams = not as_json and against is None
        answers = []
        with Engine.load(model, base=base, device=device, settings=one_row) as engine:
            for text in prompt:
                answers.append(answer(engine, text, sampling, raw=raw, write=stream if streams else None))
                if streams:
                    stream("\n")
        document: dict[str, Any] = {
            "model": model,
            "answers": [{"prompt": text, **vars(made)} for text, made in zip(prompt, answers, strict=True)],
        }
        if against is not None:
            del engine  # and its model, before the other's comes
            with Engine.load(against, device=device, settings=one_row) as other:
                others = [answer(other, text, sampling, raw=raw) for text in prompt]
            document |= {"against": against, "against_answers": [vars(made) for made in others]}
            table = [(text, o.text, a.text) for text, o, a in zip(prompt, others, answers, strict=True)]
            report.prose_table("Side by side", ("prompt", against, model), table)
        report.finish(document)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A further model, by an adapter; may be given several times."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved since training.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A page in the browser: two models side by side, experts.")] = False,
    host: Annotated[str, typer.Option(help="Of the page: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 or more, below 1.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: int = 0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a conversation; the model's by default.")
    ] = None,
    residency: ResidencyOption = "auto",
    device_gib: DeviceGib = None,
    routing: RoutingFile = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Talk with a model in the terminal, or on a page with --ui."""
    with reporting(False, debug) as report:
        quiet_libraries(debug)
        from finetune.chat.requirements import require_gradio
        from finetune.infer.request import Sampling

        if ui:
            require_gradio()
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
        from finetune.chat.command import Asked, talk, talk_on_page
        from finetune.infer.settings import EngineSettings

        settings = EngineSettings(
            max_length=max_length,
            residency=residency,  # type: ignore[arg-type]  # checked by the engine
            device_gib=device_gib,
            routing=routing,
        )
        asked = Asked(model, adapter or (), base, device, sampling, system, settings)
        if ui:
            talk_on_page(asked, report, host=host, port=port)
        else:
            talk(asked, report)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; give a key where others reach it.")] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A further model, by an adapter; may be given several times."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.", show_default="its folder's")] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved since training.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a prompt and its answer.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that decode at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more hear 429.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Size of a request.")] = 8.0,
    kv_gib: Annotated[float | None, typer.Option(help="Memory for keys and values; what is free by default.")] = None,
    residency: ResidencyOption = "auto",
    device_gib: DeviceGib = None,
    routing: RoutingFile = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Holds the key that clients must show; else FINETUNE_API_KEY.", show_default=False),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP in OpenAI's form, until Ctrl+C or SIGTERM."""
    with reporting(False, debug) as report:
        quiet_libraries(debug)
        from finetune.serve.requirements import require_packages

        require_packages()
        from finetune.infer.settings import EngineSettings
        from finetune.serve.command import serve as run

        run(
            model,
            report,
            host=host,
            port=port,
            adapters=adapter or (),
            name=name,
            base=base,
            device=device,
            settings=EngineSettings(
                max_batch=max_batch,
                max_length=max_length,
                kv_gib=kv_gib,
                residency=residency,  # type: ignore[arg-type]  # checked by the engine
                device_gib=device_gib,
                routing=routing,
            ),
            max_waiting=max_waiting,
            max_body_mib=max_body_mib,
            key_file=api_key_file,
        )


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its output.dir).", show_default=False)],
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug, hub_progress=True)
        from finetune.export.hub import Destination
        from finetune.export.push import push as send

        to = Destination(repo_id, private=private, branch=branch)
        report.finish(send(run, to, report, merged=merged, dry_run=dry_run))


@app.command()
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug, hub_progress=True)
        from finetune.export.pull import pull as fetch

        pulled = fetch(repo_id, output, report, revision=revision, allow_unsafe=allow_unsafe)
        report.line(f"{pulled.repo_id} at {pulled.commit}, every hash as the commit names it, in {output}")
        report.finish({"output": str(output), **pulled.to_dict()})


@adapter_app.command("inspect")
def adapter_inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter or non-MoE tuning.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Its base, if it has moved since training.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter is: kind, rank, targets, base, recipe, data, and its norms layer by layer."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.export.adapter_report import inspect_adapter, show_adapter

        document = inspect_adapter(adapter, base_path=base)
        show_adapter(document, report)
        report.finish(document)


@data_app.command("check")
def data_check(
    recipe: RecipePath,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many examples, what is learnt coloured.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page.", show_default=False)] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write a corrected copy of the data to this new folder.", show_default=False)
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one GPU, for the cost.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report what a recipe's data teaches, before a GPU is touched; exit status 1 where training would refuse it."""
    with reporting(as_json, debug) as report:
        loaded = load_recipe(recipe, overrides or ())
        quiet_libraries(debug)
        from finetune.datacheck.check import check_data

        document = check_data(
            loaded, report, name=str(recipe), show=show, html=html, fix=fix, price_per_hour=price_per_hour
        )
        report.finish(document)
    if any(fault["level"] == "error" for fault in document["faults"]):
        raise typer.Exit(1)


@router_app.command("drift")
def router_drift(
    model: Annotated[Path, typer.Argument(help="Adapter folder, or a merged model with --base.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Base model; an adapter names its own.")] = None,
    data: ProbeData = None,
    max_tokens: ProbeTokens = 65_536,
    device: Device = "auto",
    out: DocumentOut = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far fine-tuning moved the routing from the base's, on the same text."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.routerstudy.drift_command import router_drift as run

        report.finish(run(model, report, base=base, data=data or (), max_tokens=max_tokens, device=device, out=out))


@router_app.command("analyze")
def router_analyze(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if it has moved since training.")] = None,
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
        quiet_libraries(debug)
        from finetune.routerstudy.analyze import router_analyze as run

        document = run(
            model, report, base=base, data=data or (), max_tokens=max_tokens, device=device, html=html, out=out
        )
        report.finish(document)


@router_app.command("report")
def router_report(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its output.dir).", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write the report as one page.", show_default=False)] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw the PNGs into this folder.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report what a run did to the routing: the verdict, load, curves against the base, drift, alarms."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.routerstudy.report import report_run

        report.finish(report_run(run, report, html=html, figures=figures))


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


@bench_app.command("train")
def bench_train(
    recipe: RecipePath,
    overrides: Overrides = None,
    batch: Batch = None,
    length: Length = None,
    steps: Steps = 8,
    random_weights: Annotated[bool, typer.Option(help="Only the shape of the model, without a checkpoint.")] = False,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the training of a recipe: trainer, bare step, roofline, memory, kernels."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.result import hand_over, require_appendable
        from finetune.bench.train import bench_train as run

        require_appendable(out)
        document = run(
            recipe,
            report,
            overrides=overrides or (),
            batch=batch,
            length=length,
            steps=steps,
            random_weights=random_weights,
        )
        hand_over(document, report, out)


@bench_app.command("router")
def bench_router(
    recipe: RecipePath,
    overrides: Overrides = None,
    batch: Batch = None,
    length: Length = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of a turn.")] = 3,
    rounds: Annotated[int, typer.Option(min=2, help="Turns with the capture on, and as many off.")] = 8,
    random_weights: Annotated[bool, typer.Option(help="Only the shape of the model, without a checkpoint.")] = False,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what watching the routers costs a training step."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.result import hand_over, require_appendable
        from finetune.bench.router import bench_router as run

        require_appendable(out)
        document = run(
            recipe,
            report,
            overrides=overrides or (),
            batch=batch,
            length=length,
            steps=steps,
            rounds=rounds,
            random_weights=random_weights,
        )
        hand_over(document, report, out)


@bench_app.command("decode")
def bench_decode(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may be given several times.")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens before; may be given several times.")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prompt whose reading is measured; 0: none.")] = 4096,
    tokens: Annotated[int, typer.Option(min=8, help="Generated by each request.")] = 64,
    random_weights: Annotated[bool, typer.Option(help="Only the shape of the model, without a checkpoint.")] = False,
    experts: Annotated[str, typer.Option(help="Of random weights: nf4, hqq3 or hqq2.")] = "nf4",
    peer: Annotated[bool, typer.Option(help="Also transformers' generate on the bitsandbytes model.")] = False,
    device_gib: Annotated[
        list[float] | None,
        typer.Option(min=0.1, help="Instead: experts in host memory, in so much of the device; several times."),
    ] = None,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the engine: tokens a second by batch and context, beside what the memory's bandwidth allows."""
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.decode import bench_decode as run
        from finetune.bench.result import hand_over, require_appendable

        require_appendable(out)
        document = run(
            model,
            report,
            batches=batch or (1, 4, 16, 64),
            contexts=context or (128, 4096),
            prefill=prefill,
            tokens=tokens,
            experts=experts,  # type: ignore[arg-type]  # checked by the loader
            random_weights=random_weights,
            device=device,
            peer=peer,
            device_gib=device_gib or (),
        )
        hand_over(document, report, out)


@bench_app.command("peers")
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.peers import bench_peers as run
        from finetune.bench.result import hand_over, require_appendable

        require_appendable(out)
        hand_over(run(report, shape=shape, batch=batch, length=length, steps=steps, layers=layers), report, out)


@bench_app.command("data")
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.data import bench_data as run
        from finetune.bench.result import hand_over, require_appendable

        require_appendable(out)
        hand_over(run(report, rows=rows, processes=processes, max_length=length, source=source), report, out)


@bench_app.command("kernels")
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.kernels import TOKENS
        from finetune.bench.kernels import bench_kernels as run
        from finetune.bench.result import hand_over, require_appendable

        require_appendable(out)
        hand_over(run(report, shape=shape, tokens=tokens or TOKENS), report, out)


@bench_app.command("experts")
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
    with reporting(as_json, debug) as report:
        quiet_libraries(debug)
        from finetune.bench.experts import bench_experts as run
        from finetune.bench.result import hand_over, require_appendable

        require_appendable(out)
        hand_over(run(model, report, data=data, rows=rows, device=device), report, out)


@contextlib.contextmanager
def reporting(as_json: bool, debug: bool) -> Iterator[Report]:
    """Gives a command its report, and turns a user's mistake into one message and exit status 2."""
    report = Report(as_json=as_json)
    try:
        with report.working(), full_disk_explained("an output folder, or the cache of a library"):
            yield report
    except FinetuneError as error:
        fail(error, debug)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; a training run continues with --resume\n")
        raise typer.Exit(130) from None


def fail(error: FinetuneError, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(2)


def quiet_libraries(debug: bool, *, hub_progress: bool = False) -> None:
    """Keeps libraries from talking over the report, unless the user asked them to; set before they are imported.

    Args:
        hub_progress: the hub's client shows its bars.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The allocator's segments grow instead of being split. The memory margin counts on it: 0.3 GiB is reserved beyond
    # the tensors with it (8 x 1024 tokens in 34 GiB, H100).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if debug else "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not hub_progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers 5.2x renames arguments that 5.17 knows only by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
