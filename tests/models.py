"""Tiny random models of every supported family, and their plain dequantized twins.

The sizes differ from each other wherever two could be confused (hidden, attention width, intermediate), all multiples
of 64; weights are drawn wide enough (`initializer_range`) that routers choose and logits differ.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from finetune.adapter.lora import add_attention_lora, save_adapter
from finetune.kernels.nf4 import Nf4Weights, dequantize_reference
from finetune.kernels.packed_experts import dequantize_experts
from finetune.moe.base_spec import BaseSpec
from finetune.moe.experts import QuantizedExperts
from finetune.moe.load import load_base
from tests.conftest import REPOSITORY, TOKENIZER_FILES

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCAB = 2, 4, 128, 192, 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A config of about 0.7 M parameters; `overrides` win."""
    if family == "mixtral":
        return MixtralConfig(
            **{**_COMMON, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "head_dim": 48, **overrides}
        )
    if family == "qwen3_moe":
        sizes = {
            "moe_intermediate_size": INTERMEDIATE,
            "intermediate_size": 320,
            "num_experts": EXPERTS,
            "head_dim": 48,
        }
        return Qwen3MoeConfig(**{**_COMMON, **sizes, "norm_topk_prob": True, **overrides})
    assert family == "olmoe", family
    return OlmoeConfig(**{**_COMMON, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, **overrides})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A plain random model in eval mode; norms are drawn around one, so that a norm left at its default would show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = (1 + 0.1 * torch.randn(parameter.shape)).to(dtype)
    return model.eval()


def save_fused(model: PreTrainedModel, folder: Path) -> None:
    """The layout with transformers' own fused names, which `save_pretrained` does not write for these families."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tokens(rows: int = 2, length: int = 17, *, seed: int = 0) -> Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def dequantized_twin(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A plain transformers model that holds the dequantized weights of a quantized one: the truth to compare with.

    Experts come from the plain-torch dequantization, attention from bitsandbytes' function; the forward is
    transformers' eager loop over experts.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    twin = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    wanted = twin.state_dict()
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for projection in ("gate_up_proj", "down_proj"):
                stack = module.packed(projection)
                reference = dequantize_reference if isinstance(stack, Nf4Weights) else dequantize_experts
                found[f"{name}.{projection}"] = reference(stack, dtype)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, Params4bit):
                state = copy.copy(parameter.quant_state)
                state.dtype = dtype
                found[f"{name}.{key}"] = bnb.dequantize_4bit(parameter.data, state)
            else:
                found[f"{name}.{key}"] = parameter.detach().to(dtype)
    assert set(wanted) - set(found) <= {"lm_head.weight"}, "only a tied head may be absent"
    twin.load_state_dict({name: found.get(name, tensor) for name, tensor in wanted.items()})
    twin.tie_weights()
    return twin.train(model.training)


def save_small_mixtral(folder: Path, *, tied: bool) -> Path:
    """A random bf16 Mixtral of 2 layers and 4 experts with the bundled model's tokenizer of 32,000 tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(REPOSITORY / "recipes" / "tiny-mixtral" / "model" / name, folder / name)
    return folder


def save_lora(base: Path, folder: Path, *, r: int = 4, std: float = 0.0) -> Path:
    """An adapter of the attention as a run saves it, in `folder`.

    Args:
        std: how wide the B matrices are drawn; 0 changes no answer, NaN breaks the model.
    """
    loaded = load_base(BaseSpec(str(base)), device="cpu")
    torch.manual_seed(0)
    model = add_attention_lora(loaded.model, loaded.arch, r=r)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn_like(parameter))
    save_adapter(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    loaded.base.save(folder)
    return folder
