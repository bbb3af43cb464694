"""The one loader: training, evaluation, merging, generating and serving all get their base here.

A model folder or hub id becomes a quantized causal LM. What a run saves beside its weights (base_spec.py) is enough to
load the same thing again. Leaves out what was tuned on the base (adapter/).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import finetune.moe.quantizer  # noqa: F401 - registers the storage of the experts with transformers
from finetune.checkpoint import (
    blamed_on,
    check_model_folder,
    check_tokenizer_files,
    incomplete,
    read_json,
    require_every_expert,
)
from finetune.errors import DeviceError, FinetuneError, ModelError
from finetune.moe.arch import MoeArch
from finetune.moe.attention import read_packing, resolve_attention
from finetune.moe.base_spec import BaseSpec, QuantizingDtype, require_fingerprint, router_fingerprint
from finetune.moe.config import QUANT_METHOD, Moe4bitConfig
from finetune.moe.experts import QuantizedExperts
from finetune.moe.fused_layers import FusedLayers, fuse_layers, wants_fused_layers
from finetune.moe.random_weights import build_random_model
from finetune.moe.skeleton import build_skeleton, check_generation_config, require_fitting_weights
from finetune.private_api import move_own_tensors

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
ExpertsOn = Literal["device", "host"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with the tokenizer and the facts it was loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arch: MoeArch
    base: BaseSpec
    device: torch.device


def resolve_device(device: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; each process of a launch gets its own GPU.

    Raises:
        DeviceError: "cuda" without a GPU, or another name.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(
            f"there is no device {device!r}",
            where="--device",
            allowed="auto, cpu, cuda",
            fix="choose one of them; CUDA_VISIBLE_DEVICES selects the GPU",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "a GPU is asked for and torch sees none",
            where="model.device: cuda, or --device cuda",
            allowed="auto, cpu, cuda",
            fix="choose auto, or install a CUDA build of torch and check nvidia-smi",
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the GPU has it or is not at hand, float16 on older GPUs, float32 on a CPU."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cpu":
        return torch.float32
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def read_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub id, checked, without loading weights.

    Raises:
        ModelError: unknown folder or hub id, or a config that describes no supported model.
    """
    if is_local(path):
        folder = Path(path)
        config = read_json(folder / "config.json") if folder.is_dir() else check_model_folder(folder)
        MoeArch.from_config(config, where=path)
        return config
    try:
        return AutoConfig.from_pretrained(path, revision=revision).to_dict()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path!r} is neither a local folder nor a model that could be fetched from the hub: {_first_line(error)}",
            where="model.path, or the command's argument",
            allowed="a folder with config.json and safetensors, or a hub id like mistralai/Mixtral-8x7B-v0.1",
            fix="check the spelling, the network, and for gated models the HF_TOKEN",
        ) from None


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; </s> stays a token of its own, so padding is <unk> when none is set.

    Raises:
        ModelError: no tokenizer there.
    """
    check_tokenizer_files(Path(path))
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZERS):
        raise _no_tokenizer(path, f"the folder holds no {' and no '.join(_TOKENIZERS)}")
    try:
        with blamed_on("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except ModelError as error:
        raise _no_tokenizer(path, _first_line(error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _no_tokenizer(path: str, why: str) -> ModelError:
    fix = "put tokenizer.json and tokenizer_config.json into the model folder"
    return ModelError(f"no tokenizer could be read: {why}", where=path, fix=fix)


def load_tokenizer_of(base: BaseSpec, arch: MoeArch) -> PreTrainedTokenizerBase:
    """The base's tokenizer, each of whose tokens the base can embed.

    Raises:
        ModelError: no tokenizer there, or one of another model.
    """
    tokenizer = load_tokenizer(base.path, base.revision)
    if len(tokenizer) > arch.vocab:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {arch.vocab}",
            where=base.path,
            fix="use the tokenizer that belongs to the model",
        )
    return tokenizer


def check_base(
    base: BaseSpec, attn_implementation: str = "auto", *, weights: bool = True
) -> tuple[dict[str, Any], MoeArch]:
    """Config and shape of a base, after every check that needs no more than its config and its shards' headers.

    Args:
        weights: False leaves the shards out, where only the shape is wanted.

    Raises:
        ModelError: missing, damaged, incomplete or unsupported checkpoint, or one stored otherwise than asked.
    """
    local = is_local(base.path)
    config = check_model_folder(Path(base.path)) if local and weights else read_config(base.path, base.revision)
    arch = MoeArch.from_config(config, where=base.path)
    _require_same_storage(config, base)
    skeleton = build_skeleton(config, base.path)
    if local:
        check_generation_config(Path(base.path))
    if local and weights:
        require_every_expert(Path(base.path), arch.experts)
        require_fitting_weights(Path(base.path), arch, skeleton, quantized=base.attention == "nf4")
    known = ["auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # With a slash it is a kernel on the hub.
    if attn_implementation not in known and "/" not in attn_implementation:
        raise ModelError(
            f"transformers has no attention function {attn_implementation!r}",
            where="model.attn_implementation",
            allowed=", ".join(name for name in known if "|" not in name),
            fix="set model.attn_implementation=auto",
        )
    return config, arch


def load_base(
    base: BaseSpec,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "auto",
    fused_layers: FusedLayers = "auto",
    random_weights_seed: int | None = None,
    experts_on: ExpertsOn = "device",
) -> LoadedModel:
    """Loads a base model with its experts quantized.

    Args:
        experts_on: "host" leaves the experts in the host's memory, everything else on the device. A checkpoint in 16
            bits is then quantized by the CPU.
        fused_layers: see `fused_layers.wants_fused_layers`.
        random_weights_seed: builds the shape of `base.path`'s config.json from random weights instead.

    Raises:
        ModelError: missing, damaged, incomplete or unsupported checkpoint, or one stored otherwise than asked.
        DeviceError: the device does not exist.
    """
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    config, arch = check_base(base, attn_implementation, weights=random_weights_seed is None)
    tokenizer = load_tokenizer_of(base, arch)
    attn_implementation = resolve_attention(attn_implementation, where, torch_dtype, arch.head_dim)
    if random_weights_seed is not None:
        model = build_random_model(
            AutoConfig.from_pretrained(base.path, revision=base.revision),
            Moe4bitConfig(attention=base.attention, experts=base.experts),
            dtype=torch_dtype,
            device=where,
            attn_implementation=attn_implementation,
            seed=random_weights_seed,
            experts_device=torch.device("cpu") if experts_on == "host" else None,
        )
    elif experts_on == "host":
        model = _from_pretrained(base, config, torch_dtype, torch.device("cpu"), attn_implementation)
        _move_all_but_experts(model, where)
    else:
        model = _from_pretrained(base, config, torch_dtype, where, attn_implementation)
    read_packing(model)
    if wants_fused_layers(fused_layers, where, arch.model_type):
        fuse_layers(model)
    fingerprint = router_fingerprint(model, arch)
    require_fingerprint(base, fingerprint)
    quantization: Any = model.config.quantization_config
    quantized = {"experts": quantization.experts, "quantizing_dtype": _quantizing_dtype(model)}
    spec = replace(base, fingerprint=fingerprint, **quantized)
    return LoadedModel(model, tokenizer, arch, spec, where)


def _from_pretrained(
    base: BaseSpec, config: dict[str, Any], dtype: torch.dtype, device: torch.device, attn_implementation: str
) -> PreTrainedModel:
    # A saved folder brings its own; transformers takes even a None in its place.
    wanted = {"quantization_config": Moe4bitConfig(base.attention, base.experts)}
    saved = saved_quantization(config)
    quantization = {} if saved else wanted
    # Every weight goes through the dtype that it had in training, whatever the model then computes in.
    through = resolve_dtype(base.quantizing_dtype, device) if base.quantizing_dtype and not saved else dtype
    loader: Any = AutoModelForCausalLM  # its stub hides that output_loading_info returns a pair
    try:
        model, info = loader.from_pretrained(
            base.path,
            revision=base.revision,
            **quantization,
            dtype=through,
            device_map={"": device},
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except FinetuneError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"the model could not be loaded: {_first_line(error)}",
            where=base.path,
            fix="correct what the message names; --debug shows the report of transformers",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise incomplete(missing)
    if through != dtype:
        _compute_in(model, dtype)
    return model


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts every parameter that is not quantized, and has the quantized ones give their values in this dtype."""
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype  # type: ignore[attr-defined]
    model.config.dtype = dtype


def _quantizing_dtype(model: torch.nn.Module) -> QuantizingDtype | None:
    """Of a loaded model's experts; None where they were read as a saved folder holds them."""
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    name: Any = str(experts.quantized_in).removeprefix("torch.")
    return None if experts.quantized_in is None else name


def _move_all_but_experts(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        if not isinstance(module, QuantizedExperts):
            move_own_tensors(module, device)


def saved_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """How a config.json says that its weights are quantized; empty where they are not."""
    return config.get("quantization_config") or {}


def _require_same_storage(config: dict[str, Any], base: BaseSpec) -> None:
    saved = saved_quantization(config)
    if not saved:
        return
    method = saved.get("quant_method")
    if method != QUANT_METHOD:
        raise ModelError(
            f"the checkpoint is already quantized with {method}",
            where=f"{base.path}: config.json: quantization_config",
            allowed=f"an unquantized checkpoint, or one saved by this toolkit ({QUANT_METHOD})",
            fix="start from the original 16-bit checkpoint",
        )
    if saved.get("attention") != base.attention:
        raise ModelError(
            f"the folder keeps attention in {saved.get('attention')}, the recipe asks for {base.attention}",
            where=f"{base.path}: quantization.attention",
            allowed=str(saved.get("attention")),
            fix=f"set quantization.attention={saved.get('attention')}, or start from the original checkpoint",
        )


def is_local(path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything with a dot, a root or more parts, or that exists, is a path."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
