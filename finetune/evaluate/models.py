"""The models of a comparison: what each is, whether they can be compared, and loading them one after the other.

Each runs as it is stored. An adapter runs on its quantized base, `base` is that base with nothing on it, a folder that
this toolkit quantized or merged runs from its own bytes. A folder in 16 bits (`merge --format bf16` or `fp16`, or an
original) runs in 16 bits by transformers: quantized on loading, as `generate` would, it would be another model than the
one that other engines serve. On a GPU what does not fit of it stays in host memory; on a CPU it computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from finetune.adapter import Adapter, is_adapter, load, require_tuned
from finetune.errors import AdapterError, ModelError
from finetune.moe import (
    BaseSpec,
    LoadedModel,
    MoeArch,
    check_base,
    load_tokenizer,
    read_config,
    resolve_device,
    saved_quantization,
)

BASE = "base"
Kind = Literal["adapter", "base", "quantized", "16bit"]


@dataclass(frozen=True)
class Compared:
    """A model to compare, checked and not loaded.

    name: as the command gave it.
    folder: the adapter's, for "base" that of the adapter whose base it is; or the model's folder or hub id.
    base: where the base of an adapter lies now; None where its base.json says.
    """

    name: str
    folder: str
    kind: Kind
    arch: MoeArch
    tokenizer_of: str
    base: str | None

    @classmethod
    def open(cls, name: str, reference: str, *, base: str | None = None) -> Compared:
        """Checks a model as far as config, headers and adapter files go.

        Args:
            name: `base`, or a folder or hub id.
            reference: the first model, whose base `base` is.

        Raises:
            AdapterError: `base` of no adapter, or a damaged adapter.
            ModelError: missing, damaged or unsupported model.
        """
        if name == BASE and not is_adapter(reference):
            raise AdapterError(
                "the first model is no adapter, so there is no base to compare it with",
                where=f"--compare {BASE}",
                allowed=f"`{BASE}` after an adapter folder; ./{BASE} for a folder of that name",
                fix="name the other model's folder",
            )
        folder = reference if name == BASE else name
        if is_adapter(folder):
            adapter = Adapter.open(Path(folder), base=base)
            spec = adapter.require_base()
            _, arch = check_base(spec)
            kind, tokenizer_of = ("base", spec.path) if name == BASE else ("adapter", adapter.tokenizer_of)
            return cls(name, str(adapter.folder), kind, arch, tokenizer_of, base)  # type: ignore[arg-type]
        saved = saved_quantization(read_config(folder))
        _, arch = check_base(BaseSpec(folder, attention=saved.get("attention", "16bit")))
        return cls(name, folder, "quantized" if saved else "16bit", arch, folder, None)

    def load(self, device: str) -> LoadedModel:
        """The model in evaluation mode.

        Raises:
            FinetuneError: as `finetune.adapter.load`.
        """
        if self.kind == "16bit":
            loaded = _load_16bit(self.folder, device)
        elif self.kind == "base":
            loaded = Adapter.open(Path(self.folder), base=self.base).load_base(device=device)
        else:
            loaded = load(self.folder, base_path=self.base, device=device)
        loaded.model.eval()
        return loaded


def open_compared(reference: str, others: Sequence[str], *, base: str | None = None) -> list[Compared]:
    """The reference and the others, checked against it.

    Raises:
        AdapterError, ModelError: as `Compared.open`.
        AdapterError: a base is named, and none of the models is an adapter.
        ModelError: another vocabulary, or another number of layers or experts.
    """
    require_tuned(base, reference, *others)
    models = [Compared.open(name, reference, base=base) for name in (reference, *others)]
    first = models[0]
    for other in models[1:]:
        if _shape(other.arch) != _shape(first.arch):
            raise ModelError(
                "the two models are not of one shape",
                where=f"--compare {other.name}: {_shape(other.arch)}",
                allowed=_shape(first.arch),
                fix="compare models that were made from the same base",
            )
    folders = dict.fromkeys(model.tokenizer_of for model in models)
    vocabularies = {folder: load_tokenizer(folder).get_vocab() for folder in folders} if others else {}
    for other in models[1:]:
        if vocabularies[other.tokenizer_of] != vocabularies[first.tokenizer_of]:
            raise ModelError(
                "the two models have other tokens: the same number is another piece of text",
                where=f"--compare {other.name}: the tokenizer in {other.tokenizer_of}",
                allowed=f"the vocabulary of {first.tokenizer_of}",
                fix="compare models that were made from the same base",
            )
    return models


def _shape(arch: MoeArch) -> str:
    """What must be equal for tokens and experts to mean the same."""
    return f"vocabulary {arch.vocab}, {arch.layers} layers, {arch.top_k} of {arch.experts} experts a token"


def _load_16bit(path: str, device: str) -> LoadedModel:
    where = resolve_device(device)
    spec = BaseSpec(path, attention="16bit")
    _, arch = check_base(spec)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if where.type == "cpu" else "auto",
        device_map={"": where} if where.type == "cpu" else "auto",
        attn_implementation="sdpa",
    )
    return LoadedModel(model, load_tokenizer(path), arch, spec, where)
