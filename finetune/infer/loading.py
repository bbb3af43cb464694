"""What an engine serves: one loaded base and the names of what may be asked of it.

An adapter folder gives two models, itself and its base; further adapters of the same base come by name. A non-MoE
tuning has changed the base's own weights, so it stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import AdapterError
from finetune.model import BaseSpec, LoadedModel, load, load_base_of
from finetune.trainable import add_adapters, read_adapter_kind

BASE_NAME = "base"


@dataclass(frozen=True)
class ServedModels:
    """A loaded model and, by name, which of its adapters a request goes by: 0 the base, n adapter n - 1.

    Attributes:
        adapters: the adapters' names in PEFT, which are the names asked for.
    """

    loaded: LoadedModel
    adapters: tuple[str, ...]
    selectors: Mapping[str, int]


def load_models(
    path: str, adapters: Mapping[str, str], *, name: str | None, base: str | None, device: str
) -> ServedModels:
    """Loads `path`, whatever it is, and the named adapters beside it.

    Raises:
        FinetuneError: as `model.load`; `AdapterError` for adapters of another base, or names that are taken.
    """
    own = name or default_name(path)
    kind = read_adapter_kind(Path(path)) if Path(path).is_dir() else None
    wanted = dict(adapters)
    taken = {own, BASE_NAME} if kind == "lora" else {own}
    for other in wanted:
        if other in taken or "." in other:
            raise AdapterError(
                f"an adapter cannot be called {other!r} here",
                where=f"--adapter {other}={wanted[other]}",
                allowed=f"a name without dots that is not one of {', '.join(sorted(taken))}",
                fix="give it another name",
            )
    if kind == "non_moe" and wanted:
        raise AdapterError(
            "adapters go onto the base that they were trained on; this is a tuning of the base's own weights",
            where=path,
            fix="serve the base with --adapter, or this folder without",
        )
    if kind != "lora":
        loaded = load(path, base_path=base, device=device) if kind else load(path, device=device)
        names = [own]
    else:
        loaded = load_base_of(Path(path), base_path=base, device=device)
        wanted = {own: path, **wanted}
        names = [BASE_NAME]
    for other, folder in wanted.items():
        _require_same_base(loaded, Path(folder), other)
    if wanted:
        model: Any = add_adapters(loaded.model, {other: Path(folder) for other, folder in wanted.items()})
        loaded = LoadedModel(model, loaded.tokenizer, loaded.arch, loaded.base, loaded.device)
    selectors = {names[0]: 0} | {other: number for number, other in enumerate(wanted, start=1)}
    if kind == "lora":
        selectors = {own: 1} | selectors
    return ServedModels(loaded, tuple(wanted), selectors)


def default_name(path: str) -> str:
    """The folder's name; of an `adapter` folder in a run, the run's."""
    folder = Path(path)
    resolved = folder.resolve() if folder.exists() else folder
    return (resolved.parent if resolved.name in ("adapter", "model") else resolved).name.replace(".", "_") or "model"


def _require_same_base(loaded: LoadedModel, folder: Path, name: str) -> None:
    if read_adapter_kind(folder) != "lora":
        raise AdapterError(
            "there is no LoRA adapter in the folder",
            where=f"--adapter {name}={folder}",
            allowed="a folder with adapter_config.json and adapter_model.safetensors",
            fix="name the adapter folder that `finetune train` wrote",
        )
    spec = BaseSpec.read(folder)
    if spec.fingerprint != loaded.base.fingerprint:
        raise AdapterError(
            f"the adapter {name} was trained on another base: the routers differ",
            where=str(folder),
            allowed=f"adapters of the base with router fingerprint {loaded.base.fingerprint[:12]}",
            fix=f"serve it with its own base ({spec.path})",
        )
