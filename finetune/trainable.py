"""Which parameters train, and how what was trained is saved and put back.

Why: with fused experts the usual ways to say "train the attention" fail silently. PEFT's `all-linear` reaches the
router and the experts, a misspelled target can match nothing, `prepare_model_for_kbit_training` casts 180 GB of
frozen weights to fp32, and loading an adapter of another shape is a warning. Here exactly one of two sets trains, and
its size is asserted against the formula in `MoeArch`:

- `add_attention_lora`: LoRA on q/k/v/o of every layer, anchored to `self_attn`, fp32, loadable by stock `peft`;
- `unfreeze_non_moe`: everything but the experts, as fp32 masters, saved as `non_moe.safetensors` under the names that
  the parameters have in the transformers model.

How: targets are the suffixes `self_attn.q_proj`, not a regular expression, because PEFT resolves a regular expression
on a Mixtral back to bare leaf names. Before a tensor of an adapter is loaded, names and shapes in its safetensors
header are compared with what this base needs.

Leaves out: merging (export/), checkpoints of the optimizer (the trainer's), and saving from sharded parameters.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from finetune.arch import ATTENTION_PROJECTIONS, EXPERT_PROJECTIONS, MoeArch, role_of
from finetune.checkpoint import read_json, read_tensor_infos
from finetune.errors import AdapterError, FinetuneError, OutputError

LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"
NON_MOE_CONFIG, NON_MOE_TENSORS = "non_moe.json", "non_moe.safetensors"

# Names that people ask LoRA for and do not get: names, reason, way out.
_REFUSED_TARGETS = (
    (
        {*EXPERT_PROJECTIONS, "experts", "w1", "w2", "w3", "gate_proj", "up_proj", "mlp", "block_sparse_moe"},
        "the experts are frozen in 4 bits, LoRA trains the attention only",
        "remove it",
    ),
    (
        {"gate", "router"},
        "the router stays frozen under LoRA, so that routing moves only with the hidden states",
        "remove it, or train the router with trainable.method: non_moe and trainable.router: true",
    ),
    (
        {"lm_head", "head", "embed_tokens", "embeddings", "embedding"},
        "embeddings and head do not take LoRA here",
        "remove it, or train them with trainable.method: non_moe",
    ),
    ({"all-linear"}, "it would attach to the router and to the experts", "name the projections"),
)
# Settings of a LoRA adapter that would reach beyond, or shape unevenly, plain LoRA on every layer's attention.
_PLAIN_LORA_ONLY = (
    "modules_to_save",
    "target_parameters",
    "layers_to_transform",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "lora_bias",
)
_Shapes = dict[str, tuple[int, ...]]


# ---- attention LoRA -------------------------------------------------------------------------------------------


def check_targets(names: Sequence[str], *, where: str = "trainable.lora.target_modules") -> tuple[str, ...]:
    """The targets in order without repeats.

    Raises:
        AdapterError: one is not an attention projection (with the reason), or there is none.
    """
    targets = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    allowed = ", ".join(ATTENTION_PROJECTIONS)
    if not targets:
        raise AdapterError("no target module is named, so nothing would train", where=where, allowed=allowed)
    for target in targets:
        if target not in ATTENTION_PROJECTIONS:
            reason, fix = _why_refused(target.rsplit(".", 1)[-1])
            raise AdapterError(f"cannot train {target!r} with LoRA: {reason}", where=where, allowed=allowed, fix=fix)
    return targets


def _why_refused(name: str) -> tuple[str, str]:
    for names, reason, fix in _REFUSED_TARGETS:
        if name in names:
            return reason, fix
    near = difflib.get_close_matches(name, ATTENTION_PROJECTIONS, n=1)
    return "the attention has no projection of that name", f"did you mean {near[0]!r}?" if near else "remove it"


def add_attention_lora(
    model: nn.Module,
    arch: MoeArch,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> PeftModel:
    """Puts LoRA on the attention of every layer and freezes the rest; the model is changed in place and wrapped.

    Raises:
        AdapterError: a target is an expert, the router, embedding or head, unknown, or the list is empty.
    """
    targets = check_targets(target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[f"self_attn.{name}" for name in targets],
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    expected = _lora_shapes(model, arch, r=r, targets=targets, dora=use_dora)
    peft_model = get_peft_model(model, config)
    _assert_lora(peft_model, expected, arch.lora_params(r, targets, dora=use_dora))
    return peft_model


def load_adapter(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Loads a LoRA adapter onto the base it was trained on; nothing of the model is touched before all checks passed.

    Raises:
        AdapterError: a file is missing or corrupt, the adapter is no plain attention LoRA, or its tensors do not fit.
    """
    folder = Path(folder)
    arch = MoeArch.from_config(model.config.to_dict())
    _require_file(folder / LORA_CONFIG)
    config = read_json(folder / LORA_CONFIG, kind=AdapterError)
    _require_plain_lora(config, folder / LORA_CONFIG)
    found = _read_shapes(folder / LORA_TENSORS)
    targets = _saved_targets(config, found, where=str(folder / LORA_CONFIG))
    r, dora = config["r"], bool(config.get("use_dora"))
    expected = _lora_shapes(model, arch, r=r, targets=targets, dora=dora)
    _require_same(
        found,
        expected,
        folder / LORA_TENSORS,
        what=f"the adapter does not fit this model at r={r}",
        fix=f"load it onto the base it was trained on ({config.get('base_model_name_or_path')})",
    )
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    if is_trainable:
        _assert_lora(peft_model, expected, arch.lora_params(r, targets, dora=dora))
    return peft_model


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """`save_pretrained` into a neighbouring temporary folder, then one rename a file, the config last."""
    folder = Path(folder)
    with _writing(folder / LORA_TENSORS), tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as scratch:
        # False: the vocabulary never changes here, and "auto" may ask the hub for the base's config.
        model.save_pretrained(scratch, save_embedding_layers=False)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == LORA_CONFIG):
            os.replace(file, folder / file.name)


def _lora_shapes(model: nn.Module, arch: MoeArch, *, r: int, targets: Sequence[str], dora: bool) -> _Shapes:
    """Names and shapes of the tensors in `adapter_model.safetensors` for this base.

    Shapes come from the config because a 4-bit weight does not show its own.
    """
    shapes: _Shapes = {}
    for path, _ in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if leaf in targets and role_of(f"{path}.weight") == "attention":
            out_features, in_features = arch.attention_shapes()[leaf]
            prefix = f"base_model.model.{path}"
            shapes[f"{prefix}.lora_A.weight"] = (r, in_features)
            shapes[f"{prefix}.lora_B.weight"] = (out_features, r)
            if dora:
                shapes[f"{prefix}.lora_magnitude_vector"] = (out_features,)
    return shapes


def _assert_lora(model: PeftModel, expected: _Shapes, count: int) -> None:
    """Exactly the expected tensors train, in fp32, and their number is the formula's."""
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    saved_as = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in trained.items()}
    shapes = {name: tuple(p.shape) for name, p in saved_as.items()}
    assert shapes == expected, sorted(set(shapes) ^ set(expected))[:3]
    assert all(p.dtype == torch.float32 for p in trained.values()), "LoRA weights must be fp32"
    assert trainable_count(model) == count, f"{trainable_count(model)} LoRA parameters, the formula says {count}"


def _saved_targets(config: Mapping[str, Any], found: _Shapes, *, where: str) -> tuple[str, ...]:
    """Projections of an adapter: its list, or what its tensors are named after when it holds a regular expression."""
    listed = config.get("target_modules")
    paths = listed if isinstance(listed, list) else [name.split(".lora_")[0] for name in found]
    return check_targets(sorted({str(path).rsplit(".", 1)[-1] for path in paths}), where=where)


def _require_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    faults = [f"{key} is {config[key]!r}" for key in _PLAIN_LORA_ONLY if config.get(key)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {config['bias']!r}")
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')!r}")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        faults.append(f"r is {config.get('r')!r}")
    if faults:
        raise AdapterError(
            f"the adapter is not LoRA of one rank on the attention: {', '.join(faults)}",
            where=str(path),
            allowed=f"peft_type LORA on {', '.join(ATTENTION_PROJECTIONS)} of every layer, DoRA and rsLoRA included",
            fix="train the adapter without these settings",
        )


# ---- everything but the experts -------------------------------------------------------------------------------


def unfreeze_non_moe(model: nn.Module, arch: MoeArch, *, router: bool = False) -> None:
    """Attention, norms, embeddings and head train as fp32 masters; experts stay frozen, the router too unless asked.

    The router becomes fp32 either way (exactly, and it is small): the residual stream that it multiplies is fp32 then.

    Raises:
        FinetuneError: the attention is quantized.
    """
    tuned = _non_moe_parameters(model, router=router)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in tuned or role_of(name) == "router":
            parameter.data = parameter.data.float()
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    count, expected = trainable_count(model), arch.non_moe_params(router=router)
    assert count == expected, f"{count} parameters train, the formula says {expected}"


def save_non_moe(model: nn.Module, folder: str | Path, *, base: Mapping[str, Any]) -> None:
    """Writes every trainable parameter to `non_moe.safetensors`, whole or not at all, and a readable `non_moe.json`.

    Args:
        base: what identifies the base model (path, fingerprint); kept with the tensors and compared by `load_non_moe`.
    """
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    assert tensors, "nothing trains in this model"
    about = {
        "format": 1,
        "base": dict(base),
        "router": any(role_of(name) == "router" for name in tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    folder = Path(folder)
    with _writing(folder / NON_MOE_TENSORS) as scratch:
        # The header carries the same facts, so that the tensors and what is said of them cannot come apart.
        save_file(tensors, scratch, metadata={"format": "pt", "non_moe": json.dumps(about)})
        os.replace(scratch, folder / NON_MOE_TENSORS)
    with _writing(folder / NON_MOE_CONFIG) as scratch:
        scratch.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, folder / NON_MOE_CONFIG)


def load_non_moe(
    model: nn.Module,
    folder: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts saved parameters back onto their base; nothing is changed before all checks passed.

    Args:
        base: when given, must equal what `save_non_moe` was told.
        dtype: None keeps the fp32 masters bit for bit (to go on training); a 16-bit type rounds once (to serve).

    Raises:
        AdapterError: a file is missing or corrupt, or it belongs to another base.
        FinetuneError: the attention is quantized.
    """
    path = Path(folder) / NON_MOE_TENSORS
    found = _read_shapes(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "non_moe" not in metadata:
            raise AdapterError("the file does not say which base it belongs to", where=str(path), fix="save it again")
        about = json.loads(metadata["non_moe"])
        fix = f"load it onto the base it was trained on ({about['base']})"
        if base is not None and dict(base) != about["base"]:
            raise AdapterError(f"the tuned weights belong to another base than {dict(base)}", where=str(path), fix=fix)
        tuned = _non_moe_parameters(model, router=about["router"])
        expected = {name: tuple(parameter.shape) for name, parameter in tuned.items()}
        _require_same(found, expected, path, what="the tuned weights do not fit this model", fix=fix)
        for name, parameter in tuned.items():
            tensor = file.get_tensor(name)
            # copy: on a CPU the tensor is a view into the mapped file, and training writes to it.
            parameter.data = tensor.to(device=parameter.device, dtype=dtype or tensor.dtype, copy=True)
    for name, parameter in model.named_parameters():
        if role_of(name) == "router" and name not in tuned:
            parameter.data = parameter.data.to(dtype or torch.float32)


def _non_moe_parameters(model: nn.Module, *, router: bool) -> dict[str, nn.Parameter]:
    """Parameters outside the experts by name, tied ones once; refuses a quantized attention."""
    roles = {"attention", "norm", "embedding", "head", *(["router"] if router else [])}
    tuned = {name: parameter for name, parameter in model.named_parameters() if role_of(name) in roles}
    quantized = [name for name, parameter in tuned.items() if not parameter.is_floating_point()]
    if quantized:
        raise FinetuneError(
            f"4-bit weights cannot train: {len(quantized)} attention matrices are quantized",
            where=f"quantization.attention, found at {quantized[0]}",
            allowed="quantization.attention must be 16bit for trainable.method: non_moe",
            fix="set quantization.attention: 16bit",
        )
    return tuned


# ---- shared ---------------------------------------------------------------------------------------------------


def trainable_count(model: nn.Module) -> int:
    """Number of parameters that train; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def keep_fp32_masters(model: nn.Module) -> Iterator[None]:
    """Undoes any cast of the trainable parameters inside the block, exactly.

    TRL's SFTTrainer casts whatever trains to bf16 when the base is quantized: build the trainer inside this block.
    """
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name].to(parameter.device)


def read_adapter_kind(folder: str | Path) -> Literal["lora", "non_moe"] | None:
    """What kind of tuned weights a folder holds, by its file names; None when it holds neither."""
    folder = Path(folder)
    if (folder / LORA_CONFIG).is_file():
        return "lora"
    if (folder / NON_MOE_TENSORS).is_file() or (folder / NON_MOE_CONFIG).is_file():
        return "non_moe"
    return None


def check_tuned(folder: Path) -> None:
    """Checks the files of a folder of tuned weights by their headers, before minutes are spent on loading the base.

    Raises:
        AdapterError: a file is missing or corrupt.
    """
    if read_adapter_kind(folder) == "lora":
        read_json(folder / LORA_CONFIG, kind=AdapterError)
        _read_shapes(folder / LORA_TENSORS)
    else:
        _read_shapes(folder / NON_MOE_TENSORS)


def _read_shapes(path: Path) -> _Shapes:
    """Names and shapes from a safetensors header; a truncated file fails here already."""
    _require_file(path)
    return {info.name: info.shape for info in read_tensor_infos(path, kind=AdapterError)}


def _require_file(path: Path) -> None:
    if not path.is_file():
        present = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else None
        raise AdapterError(
            f"{path.name} is missing" if present is not None else f"no adapter folder {str(path.parent)!r}",
            where=str(path) if present is None else f"{path.parent} (holds: {present or 'nothing'})",
            allowed=f"a folder with {LORA_CONFIG} and {LORA_TENSORS}, or with {NON_MOE_TENSORS}",
            fix="give the folder that a training run saved",
        )


def _require_same(found: _Shapes, expected: _Shapes, path: Path, *, what: str, fix: str) -> None:
    missing = [f"missing {name}" for name in expected if name not in found]
    unknown = [f"unknown {name}" for name in found if name not in expected]
    shaped = [
        f"{name} is {list(found[name])}, this model needs {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [*shaped[:2], *missing[:2], *unknown[:2]]
    if faults:
        counts = f"{len(shaped)} tensors of another shape, {len(missing)} missing, {len(unknown)} unknown"
        raise AdapterError(f"{what}: {counts}", where=f"{path}: {'; '.join(faults)}", fix=fix)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to and rename; whatever goes wrong, it is removed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"could not be written: {error}", where=str(path), fix="free space there, or choose another output folder"
        ) from error
