"""What an engine serves: one loaded base, and the names of its models.

An adapter folder gives two models, itself and its base; further adapters of the same base are named. Non-MoE training
has changed the base's own weights, so its result is served alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.adapter import Adapter, is_adapter, load, open_tuned, put_side_by_side
from finetune.errors import AdapterError, FinetuneError
from finetune.infer.residency import EngineSettings, needs_offload
from finetune.moe import (
    NF4_BYTES_PER_WEIGHT,
    BaseSpec,
    ExpertsOn,
    LoadedModel,
    MoeArch,
    read_config,
    resolve_device,
    resolve_dtype,
    saved_quantization,
)

BASE_NAME = "base"


@dataclass(frozen=True)
class ServedModels:
    """A loaded model and, by name, the adapter that a request uses: 0 for the base, n for adapter n - 1.

    Attributes:
        adapters: names of the adapters in PEFT, which are those that requests use.
        tokenizers: by name, where an adapter was trained with its own; the others use the loaded model's.
        experts_on: where the experts are; with "host" they need slots on the device.
    """

    loaded: LoadedModel
    adapters: tuple[str, ...]
    selectors: Mapping[str, int]
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    experts_on: ExpertsOn = "device"


def load_models(
    path: str,
    adapters: Mapping[str, str],
    *,
    name: str | None,
    base: str | None,
    device: str,
    experts_on: ExpertsOn = "device",
) -> ServedModels:
    """Loads a model or adapter folder or hub id, and further adapters by name.

    Raises:
        FinetuneError: as `adapter.load`; `AdapterError` for adapters of another base, or names that are taken.
    """
    own = name or default_name(path)
    tuned = open_tuned(path, base=base)
    alone = tuned if tuned is not None and tuned.kind == "non_moe" else None
    taken = {own} if tuned is None or alone else {own, BASE_NAME}
    for other, folder in adapters.items():
        if other in taken or "." in other:
            raise AdapterError(
                f"an adapter cannot be called {other!r} here",
                where=f"--adapter {other}={folder}",
                allowed=f"a name without dots that is not one of {', '.join(sorted(taken))}",
                fix="give it another name",
            )
    if alone and adapters:
        raise AdapterError(
            "adapters go onto the base that they were trained on; this is a tuning of the base's own weights",
            where=path,
            fix="serve the base with --adapter, or this folder without",
        )
    wanted = {other: _open_lora(other, folder) for other, folder in adapters.items()}
    # A 16-bit base can be stored in more than one way: as the first adapter that says so was trained, else as any was.
    present = [adapter for adapter in (tuned, *wanted.values()) if adapter]
    leading = next((adapter for adapter in present if adapter.recorded), present[0] if present else None)
    if leading is None:
        loaded = load(path, device=device, experts_on=experts_on)
    else:
        if leading is not tuned:
            leading = Adapter.open(leading.folder, base=path if tuned is None else tuned.require_base().path)
        for adapter in wanted.values():
            adapter.require_trained_on(leading.require_base())
        loaded = leading.load_base(device=device, experts_on=experts_on)
    if alone:
        return ServedModels(alone.put_on(loaded), (), {own: 0}, {}, experts_on)
    names = [own]
    if tuned is not None:
        names, wanted = [BASE_NAME], {own: tuned, **wanted}
    tokenizers = {other: adapter.tokenizer_on(loaded) for other, adapter in wanted.items()}
    if wanted:
        loaded = put_side_by_side(loaded, wanted)
    selectors = {names[0]: 0} | {other: number for number, other in enumerate(wanted, start=1)}
    if tuned is not None:
        selectors = {own: 1} | selectors
    return ServedModels(loaded, tuple(wanted), selectors, tokenizers, experts_on)


def chooses_offload(path: str, base: str | None, device: str, settings: EngineSettings) -> bool:
    """Whether the experts of what `load_models` would load go to the host's memory; reads no more than its config.

    Raises:
        FinetuneError: a model, adapter or device that cannot be used.
    """
    tuned = open_tuned(path, base=base)
    if settings.residency != "auto":
        return settings.residency == "offload"
    spec = BaseSpec(path) if tuned is None else tuned.require_base()
    config = read_config(spec.path, spec.revision)
    arch = MoeArch.from_config(config, where=spec.path)
    where = resolve_device(device)
    dtype = resolve_dtype("auto", where)
    saved = saved_quantization(config)
    nf4 = saved.get("attention", spec.attention) == "nf4"
    attention_bits = 8 * NF4_BYTES_PER_WEIGHT if nf4 else 8.0 * dtype.itemsize
    return needs_offload(
        arch,
        dtype,
        where,
        settings,
        settings.longest(int(config["max_position_embeddings"])),
        experts=saved.get("experts", spec.experts),
        attention_bits=attention_bits,
    )


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Splits `NAME=PATH` texts into names and folders.

    Raises:
        FinetuneError: a text of another form, or a name given twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name.strip() and equals and path.strip()):
            raise FinetuneError(
                f"--adapter {text!r} does not name an adapter",
                where="--adapter",
                allowed="NAME=PATH, such as support=runs/support/adapter",
                fix="put a name of your choice before the folder",
            )
        if name in named:
            raise FinetuneError(
                f"the name {name} is given to two adapters", where="--adapter", fix="name each adapter once"
            )
        named[name] = path
    return named


def default_name(path: str) -> str:
    """The folder's name; for an `adapter` folder in a run, the run's name."""
    folder = Path(path)
    resolved = folder.resolve() if folder.exists() else folder
    return (resolved.parent if resolved.name in ("adapter", "model") else resolved).name.replace(".", "_") or "model"


def _open_lora(name: str, folder: str) -> Adapter:
    """Opens an adapter that is to share a base with others."""
    if not is_adapter(folder) or (adapter := Adapter.open(Path(folder))).kind != "lora":
        raise AdapterError(
            "there is no LoRA adapter in the folder",
            where=f"--adapter {name}={folder}",
            allowed="a folder with adapter_config.json and adapter_model.safetensors",
            fix="name the adapter folder that `finetune train` wrote",
        )
    return adapter
