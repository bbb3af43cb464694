"""Which base a model or adapter stands on: what a run saves beside its weights (`base.json`), and the fingerprint of
the routers that refuses an adapter on another base, even one of equal shape. Leaves out loading (load.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field

from finetune.checkpoint import read_json
from finetune.errors import AdapterError
from finetune.kernels import ExpertStorage
from finetune.moe.arch import MoeArch, router_path
from finetune.moe.config import AttentionStorage
from finetune.values import check_object

BASE_FILE = "base.json"
_FORMAT = 1  # of a base.json that names none
QuantizingDtype = Literal["float32", "bfloat16", "float16"]
# What an adapter that does not record it is taken to be trained on: what a GPU and `finetune quantize` quantize from.
UNRECORDED_DTYPE: QuantizingDtype = "bfloat16"


@dataclass(frozen=True)
class BaseSpec:
    """Which base, and how it is stored in memory; saved beside every adapter.

    `path` is a folder or hub id, `fingerprint` the hash of the base's routers (empty until loaded). A saved folder
    knows how its experts are stored, whatever `experts` says. `quantizing_dtype` is that of the weights that were
    quantized: another dtype rounds them first, and gives other bytes. None where nothing was quantized (the base is a
    saved folder), or in a base.json from before it was recorded. `experts_sha256` is `quant.hash_experts` of the model
    that was trained, and None until then.
    """

    # base.json holds these fields and no others.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    revision: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    attention: AttentionStorage = "nf4"
    fingerprint: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    experts: ExpertStorage = "nf4"
    quantizing_dtype: QuantizingDtype | None = None
    experts_sha256: dict[str, str] | None = None

    def save(self, folder: Path) -> None:
        (folder / BASE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> BaseSpec:
        """Reads what `save` wrote.

        Raises:
            AdapterError: the file is missing, damaged or of a newer format, or a value is none that it can have.
        """
        content, where = read_json(folder / BASE_FILE, kind=AdapterError), str(folder / BASE_FILE)
        if (written := content.pop("format", _FORMAT)) != _FORMAT:
            raise AdapterError(
                f"{BASE_FILE} is of format {written!r}, which this release of moe-qlora does not know",
                where=where,
                allowed=f"format {_FORMAT}",
                fix="update moe-qlora to the release that wrote the adapter",
            )
        return check_object(
            content,
            cls,
            kind=AdapterError,
            name=BASE_FILE,
            where=where,
            fix="use the adapter folder as `finetune train` wrote it; "
            "keys of a newer release need that release: update moe-qlora",
        )


def router_fingerprint(model: torch.nn.Module, arch: MoeArch) -> str:
    """SHA-256 over all router weights in bfloat16: they are never quantized, so every storage of a base agrees."""
    return fingerprint_of(
        model.get_submodule(router_path(layer)).get_parameter("weight") for layer in range(arch.layers)
    )


def fingerprint_of(routers: Iterable[torch.Tensor]) -> str:
    """`router_fingerprint` of weights [E, H], in order of the layers."""
    digest = hashlib.sha256()
    for weight in routers:
        digest.update(weight.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_fingerprint(base: BaseSpec, found: str) -> None:
    """Refuses a base whose routers are not those that an adapter was trained on.

    Raises:
        AdapterError: says both fingerprints.
    """
    if base.fingerprint and base.fingerprint != found:
        raise AdapterError(
            "the adapter was trained on another base: the routers differ",
            where=base.path,
            allowed=f"a base with router fingerprint {base.fingerprint[:12]} (this one has {found[:12]})",
            fix="load the base that the adapter's base.json names",
        )
