"""`Adapter`: a folder of tuned weights, LoRA or non-MoE, with all that is known of it, and a base to put it on.

A run of this toolkit records in `base.json` what it trained on: which base, by the fingerprint of its routers, and how
attention and experts were stored. An adapter from elsewhere has no such record. PEFT's `base_model_name_or_path` then
names its base unless `--base` does, and whether it was trained on 4-bit weights nobody knows: it runs on the NF4 base
that everything here runs on, and `recorded` is False, so that no text claims more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapter.files import (
    LORA_CONFIG,
    LORA_TENSORS,
    NON_MOE_TENSORS,
    Kind,
    Shapes,
    kind_of,
    read_shapes,
    require_file,
    tuned_folder,
)
from finetune.adapter.lora import add_adapters, load_adapter, projections_of, read_saved, save_adapter
from finetune.adapter.non_moe import load_non_moe, read_non_moe, save_non_moe
from finetune.adapter.settings import LoraSettings, read_lora_settings
from finetune.checkpoint import read_tensor_infos, shard_files
from finetune.errors import AdapterError, ModelError
from finetune.moe import (
    BASE_FILE,
    UNRECORDED_DTYPE,
    AttentionStorage,
    BaseSpec,
    ExpertsOn,
    LoadedModel,
    is_local,
    load_base,
    load_tokenizer,
    read_config,
    saved_quantization,
)

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose files have been checked by their headers; nothing of its base has been read.

    Attributes:
        base: what it goes onto; an empty path where nobody says.
        recorded: its folder says what it was trained on.
        named: the user named the base.
        settings: of LoRA, what `adapter_config.json` says; None for a non-MoE tuning.
        targets: the attention projections that LoRA is on.
        shapes: of every tensor in `tensors_file`, by its name there.
    """

    folder: Path
    kind: Kind
    base: BaseSpec
    recorded: bool
    named: bool
    settings: LoraSettings | None
    targets: tuple[str, ...]
    shapes: Shapes

    @classmethod
    def open(cls, folder: Path, *, base: str | None = None) -> Adapter:
        """Reads what the folder says of itself.

        Args:
            folder: of the adapter, or of the run that trained it.
            base: where the base is now, or which it is; the one that the adapter names when None.

        Raises:
            AdapterError: nothing was tuned there, a file is missing or damaged, or the adapter is of a kind that would
                not answer here as it was trained.
        """
        folder = tuned_folder(folder)
        kind = kind_of(folder)
        if kind is None:
            require_file(folder / LORA_CONFIG)
        settings = read_lora_settings(folder) if kind == "lora" else None
        shapes = read_shapes(folder / LORA_TENSORS) if settings else read_non_moe(folder / NON_MOE_TENSORS)[1]
        targets = projections_of(settings, shapes, where=str(folder / LORA_CONFIG)) if settings else ()
        recorded = os.path.lexists(folder / BASE_FILE)
        if recorded:
            spec = BaseSpec.read(folder)
        elif settings is not None:
            spec = BaseSpec(settings.base or "", settings.revision)
        else:
            spec, recorded = _in_header(folder / NON_MOE_TENSORS), True
        if base is not None:
            spec = replace(spec, path=base, revision=None)
        return cls(folder, kind or "lora", spec, recorded, base is not None, settings, targets, shapes)

    @staticmethod
    def save(
        model: PeftModel | nn.Module,
        folder: Path,
        *,
        base: BaseSpec,
        tokenizer: PreTrainedTokenizerBase,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes tensors, tokenizer with chat template, and `base.json`: all that loading needs besides the base.

        Args:
            tensors: what `trained_tensors` gathered, where the model's own are sharded.

        Raises:
            OutputError: the folder cannot be written.
        """
        if isinstance(model, PeftModel):
            save_adapter(model, folder, tensors)
        else:
            save_non_moe(model, folder, base={"path": base.path, "fingerprint": base.fingerprint}, tensors=tensors)
        tokenizer.save_pretrained(folder)
        base.save(folder)

    @property
    def tensors_file(self) -> Path:
        return self.folder / (LORA_TENSORS if self.kind == "lora" else NON_MOE_TENSORS)

    @property
    def scaling(self) -> float:
        """s of W + s B A; 1 for what replaces W."""
        return 1.0 if self.settings is None else self.settings.scaling

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer, with its chat template, was saved with it; else it speaks by its base's."""
        # Any of its files: where another was lost, loading says so, instead of the base's answering unasked.
        return any(os.path.lexists(self.folder / name) for name in _TOKENIZER_FILES)

    @property
    def tokenizer_of(self) -> str:
        """The folder or hub id that has its tokenizer."""
        return str(self.folder) if self.has_tokenizer else self.base.path

    def require_base(self) -> BaseSpec:
        """The base as it is to be loaded, after the checks that need no weights.

        Raises:
            AdapterError: nobody says which it is, it has moved, or it is stored otherwise than in training.
            ModelError: the base that the user named is not there.
        """
        where = str(self.folder / (BASE_FILE if self.recorded else LORA_CONFIG))
        fix = "name the base, a folder or hub id, with --base"
        if not self.base.path:
            raise AdapterError(
                f"the adapter does not say which base it was trained on: there is no {BASE_FILE}, and no "
                "base_model_name_or_path",
                where=where,
                fix=fix,
            )
        if not self.named and is_local(self.base.path) and not Path(self.base.path).is_dir():
            of = f" with router fingerprint {self.base.fingerprint[:12]}" if self.base.fingerprint else ""
            raise AdapterError(
                f"the base of the adapter is not where it was: {self.base.path}",
                where=where,
                allowed=f"a base{of}",
                fix="name its folder with --base",
            )
        try:
            saved = saved_quantization(read_config(self.base.path, self.base.revision))
        except ModelError as error:
            if self.named or self.recorded:
                raise
            raise AdapterError(
                f"the base that the adapter names cannot be read: {error.what}", where=where, fix=fix
            ) from None
        stored = {"attention": self.base.attention, "experts": self.base.experts}
        found = replace(self._trained_on, **(stored | {name: saved[name] for name in stored if name in saved}))
        self.require_trained_on(found)
        return found

    @property
    def _trained_on(self) -> BaseSpec:
        """The base with the dtype that its weights are quantized from, whether that was recorded or not."""
        return replace(self.base, quantizing_dtype=self.base.quantizing_dtype or UNRECORDED_DTYPE)

    def require_trained_on(self, found: BaseSpec) -> None:
        """Refuses another base than the recorded one: other routers, or other values of the weights.

        Experts in fewer bits than in training are not refused: whoever names such a base wants it smaller.

        Args:
            found: of a loaded base, without a dtype where it was saved quantized, or of another adapter.

        Raises:
            AdapterError: says both.
        """
        fix = f"load it onto its own base ({self.base.path})"
        if self.base.fingerprint and found.fingerprint and self.base.fingerprint != found.fingerprint:
            raise AdapterError(
                "the adapter was trained on another base: the routers differ",
                where=f"{self.folder}: router fingerprint {self.base.fingerprint[:12]}",
                allowed=f"adapters of the base with router fingerprint {found.fingerprint[:12]}",
                fix=fix,
            )
        trained = self._trained_on if found.quantizing_dtype else replace(self.base, quantizing_dtype=None)
        if self.recorded and _storage(trained) != _storage(found) and not _same_values(trained, found):
            assumed = trained.quantizing_dtype and not self.base.quantizing_dtype
            taken = f"; {BASE_FILE} does not record the dtype, which is then {UNRECORDED_DTYPE}" if assumed else ""
            raise AdapterError(
                f"the adapter was trained with {_storage(trained)}{taken}",
                where=str(self.folder),
                allowed=f"adapters trained with {_storage(found)}, as here",
                fix=fix,
            )

    def require_fits(self, skeleton: PreTrainedModel) -> None:
        """Checks names and shapes against a model, which may be on the meta device.

        Raises:
            AdapterError: names what is missing, unknown or of another shape.
        """
        if self.kind == "lora":
            read_saved(skeleton, self.folder)
        else:
            # On the meta device nothing is loaded, only checked.
            load_non_moe(skeleton, self.folder)

    def load_base(
        self,
        *,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str = "auto",
        experts_on: ExpertsOn = "device",
    ) -> LoadedModel:
        """Loads the base as it was trained on, with nothing put on it yet; arguments as `model.load_base`.

        Raises:
            FinetuneError: as `require_base` and `model.load_base`; `AdapterError` if it was trained on another base.
        """
        return load_base(
            self.require_base(),
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            experts_on=experts_on,
        )

    def tokenizer_on(self, base: LoadedModel) -> PreTrainedTokenizerBase:
        """The tokenizer that it was trained with, on a loaded base.

        Raises:
            ModelError: a tokenizer was saved with it and cannot be read.
            AdapterError: it has more tokens than the base's embedding.
        """
        if not self.has_tokenizer:
            return base.tokenizer
        tokenizer = load_tokenizer(str(self.folder))
        if len(tokenizer) > base.arch.vocab:
            raise AdapterError(
                f"the adapter's tokenizer has {len(tokenizer)} tokens, the base's embedding {base.arch.vocab}",
                where=str(self.folder),
                fix="name the base that it was trained on with --base",
            )
        return tokenizer

    def put_on(self, base: LoadedModel) -> LoadedModel:
        """Puts it onto its loaded base, in place.

        Raises:
            AdapterError: adapter and base do not fit.
        """
        self.require_trained_on(base.base)
        tokenizer, model = self.tokenizer_on(base), base.model
        if self.kind == "lora":
            wrapped: Any = load_adapter(model, self.folder)
            model = wrapped
        else:
            load_non_moe(model, self.folder, dtype=model.dtype)
        return replace(base, model=model, tokenizer=tokenizer)


def put_side_by_side(base: LoadedModel, adapters: Mapping[str, Adapter]) -> LoadedModel:
    """Puts LoRA adapters onto their loaded base by name, for inference; the first is the active one.

    Raises:
        AdapterError: adapter and base do not fit; nothing of the model is touched.
    """
    for adapter in adapters.values():
        adapter.require_trained_on(base.base)
    model: Any = add_adapters(base.model, {name: adapter.folder for name, adapter in adapters.items()})
    return replace(base, model=model)


def open_tuned(path: str, *, base: str | None = None) -> Adapter | None:
    """The adapter in a folder; None where `path` is anything else.

    Raises:
        AdapterError: as `Adapter.open`, or a base is named for what is no adapter.
    """
    require_tuned(base, path)
    return Adapter.open(Path(path), base=base) if is_adapter(path) else None


def require_tuned(base: str | None, *paths: str) -> None:
    """Refuses a base that the user named for nothing.

    Raises:
        AdapterError: none of the paths is an adapter.
    """
    if base is not None and not any(map(is_adapter, paths)):
        raise AdapterError(
            f"--base names the base of an adapter, and there is none in {' or '.join(paths)}",
            where=f"--base {base}",
            allowed="--base with the folder of an adapter, as `finetune train` or peft saved it",
            fix="leave --base out, or give the adapter's folder instead of a model's",
        )


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder of tuned weights, or of a run with one, rather than a model or a hub id.

    Raises:
        AdapterError: a run that has no adapter yet.
    """
    return kind_of(tuned_folder(path)) is not None


def load(
    path: str,
    *,
    base_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "auto",
    attention: AttentionStorage | None = None,
    experts_on: ExpertsOn = "device",
) -> LoadedModel:
    """Loads whatever `path` is: a base or merged model, or an adapter (LoRA or non-MoE) with its base.

    Args:
        base_path: overrides the base that the adapter names.
        attention: storage for a base that is not quantized yet; a saved folder knows its own.
        experts_on: as `model.load_base`.

    Raises:
        FinetuneError: as `model.load_base` and `open_tuned`; `AdapterError` if adapter and base do not fit.
    """
    how: dict[str, Any] = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    adapter = open_tuned(path, base=base_path)
    if adapter is not None:
        return adapter.put_on(adapter.load_base(**how, experts_on=experts_on))
    saved = saved_quantization(read_config(path)).get("attention")
    return load_base(BaseSpec(path, attention=saved or attention or "nf4"), **how, experts_on=experts_on)


def _same_values(one: BaseSpec, other: BaseSpec) -> bool:
    """Whether two dtypes give the same bytes: float32 holds the very values of a checkpoint that is all in 16 bits."""
    if one.attention != other.attention or not Path(other.path).is_dir():
        return False
    stored = {info.dtype for file in shard_files(Path(other.path)) for info in read_tensor_infos(file)}
    own = {"BF16": "bfloat16", "F16": "float16"}.get(stored.pop()) if len(stored) == 1 else None
    return {one.quantizing_dtype, other.quantizing_dtype} == {"float32", own}


def _storage(base: BaseSpec) -> str:
    quantized = f", quantized from {base.quantizing_dtype}" if base.quantizing_dtype else ""
    return f"the attention in {base.attention}{quantized}"


def _in_header(tensors: Path) -> BaseSpec:
    """The base that the header of a non-MoE tuning names: its attention was in 16 bits."""
    about = read_non_moe(tensors)[0].base
    return BaseSpec(str(about.get("path", "")), attention="16bit", fingerprint=str(about.get("fingerprint", "")))
