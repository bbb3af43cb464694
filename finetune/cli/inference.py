"""`finetune generate`, `chat` and `serve`: models that answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import Base, Debug, Device, DeviceGib, Json, ResidencyOption, RoutingFile, sane_size
from finetune.cli.reporting import reporting
from finetune.errors import require_packages

if TYPE_CHECKING:
    from finetune.infer import Engine

Model = Annotated[str, typer.Argument(help="Model or adapter folder, or hub id.", show_default=False)]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Another model, from an adapter; may be given several times."),
]
TopP = Annotated[float, typer.Option(help="Above 0, at most 1.")]


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a model, adapter or run; or hub id.", show_default=False)],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to ask; may be given several times.")],
    against: Annotated[str | None, typer.Option(help="Another model to answer the same, side by side.")] = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: TopP = 1.0,
    seed: int = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")
    ] = False,
    residency: ResidencyOption = "auto",
    device_gib: DeviceGib = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer prompts, streamed."""
    with reporting(as_json, debug) as report:
        from finetune.infer import Engine, EngineSettings, Sampling
        from finetune.infer import generate as answer

        sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed)
        # The residency is checked there.
        one_row = EngineSettings(max_batch=1, residency=residency, device_gib=device_gib)  # type: ignore[arg-type]

        def stream(text: str) -> None:
            report.stdout.write(text)
            report.stdout.flush()

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


def chat(
    model: Annotated[str, typer.Argument(help="Folder of a model, adapter or run; or hub id.", show_default=False)],
    adapter: Adapters = None,
    base: Base = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A page in the browser: two models side by side, experts.")] = False,
    host: Annotated[str, typer.Option(help="Of the page: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: TopP = 1.0,
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
        if ui:
            require_packages("gradio", "httptools", where="finetune chat --ui", extra="ui")
        from finetune.chat import talk, talk_on_page
        from finetune.infer import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
        limits: dict[str, Any] = {
            "max_length": max_length,
            "residency": residency,
            "device_gib": device_gib,
            "routing": routing,
        }
        load = _loader(model, adapter, base=base, device=device, **limits)
        if ui:
            talk_on_page(load, sampling, system, report, host=host, port=port)
        else:
            talk(load, sampling, system, report)


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model, adapter or run; or hub id.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; give a key where others reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    adapter: Adapters = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.", show_default="its folder's")] = None,
    base: Base = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a prompt and its answer.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that decode at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more get 429.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.001, callback=sane_size, help="Size of a request.")] = 8.0,
    max_connections: Annotated[int, typer.Option(min=1, help="Clients that are connected at once.")] = 1000,
    kv_gib: Annotated[
        float | None, typer.Option(callback=sane_size, help="Memory for keys and values; what is free by default.")
    ] = None,
    residency: ResidencyOption = "auto",
    device_gib: DeviceGib = None,
    routing: RoutingFile = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Holds the key that clients must show; else FINETUNE_API_KEY.", show_default=False),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A Host header to answer besides this machine's own names; * for any."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origins of web pages that may ask (https://app.example.org); * for any."),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP in OpenAI's form, until Ctrl+C or SIGTERM."""
    with reporting(False, debug) as report:
        packages = ("fastapi", "uvicorn", "httptools", "prometheus_client")
        require_packages(*packages, where="finetune serve", extra="serve")
        from finetune.serve import serve as run

        limits: dict[str, Any] = {
            "max_length": max_length,
            "residency": residency,
            "device_gib": device_gib,
            "routing": routing,
        }
        load = _loader(model, adapter, name=name, base=base, device=device, kv_gib=kv_gib, **limits)
        run(
            partial(load, max_batch),
            report,
            host=host,
            port=port,
            max_waiting=max_waiting,
            max_body_mib=max_body_mib,
            max_connections=max_connections,
            key_file=api_key_file,
            allowed_hosts=allowed_host or (),
            cors_origins=cors_origin or (),
        )


def _loader(
    model: str, adapter: list[str] | None, *, name: str | None = None, base: str | None, device: str, **limits: Any
) -> Callable[[int], Engine]:
    """Loads the engine for so many answers at once.

    Args:
        limits: further ones of `EngineSettings`.
    """
    from finetune.infer import Engine, EngineSettings, parse_adapters

    adapters = parse_adapters(adapter or ())

    def load(max_batch: int) -> Engine:
        settings = EngineSettings(max_batch=max_batch, **limits)
        return Engine.load(model, adapters=adapters, name=name, base=base, device=device, settings=settings)

    return load
