"""One peer, in a process of its own: what a user would pick instead, on a random model of the same shape.

    python -m finetune.bench.peer parametrization --shape recipes/mixtral-8x7b/shape --batch 8 --length 1024

    parametrization  transformers with `grouped_mm` experts, fused tensors behind bitsandbytes' 4-bit parametrization,
                     attention in bitsandbytes' Linear4bit, PEFT's LoRA on q/k/v/o (what Axolotl does)
    liger            the same, with liger-kernel's RMSNorm, RoPE and fused linear cross-entropy
    unsloth          Unsloth's loader, LoRA and checkpointing over a checkpoint that is written for it

All with full checkpointing, sdpa, AdamW and bf16 autocast on a GPU, and transformers' own loss. The step is bare:
forward, backward, clip, optimizer. Prints one JSON line. A process of its own, because such libraries patch classes
for good and memory that one leaves behind would be the next one's.

Heavy imports stand inside the functions: Unsloth wants to be imported before transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.bench.workload import WARM_UP
from finetune.checkpoint import read_json
from finetune.moe import ATTENTION_PROJECTIONS, EXPERT_PROJECTIONS, MoeArch, experts_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

# Peer -> packages that it needs beside those of this toolkit.
PEERS: dict[str, tuple[str, ...]] = {
    "parametrization": (),
    "liger": ("liger_kernel",),
    "unsloth": ("unsloth",),
}
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": list(ATTENTION_PROJECTIONS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--shape", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=0, help="build fewer layers; 0 is all")
    parser.add_argument("--decode", action="store_true", help="measure `generate` after --length tokens instead")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        if args.decode:
            result = measure_generate(args.shape, batch=args.batch, length=args.length, steps=args.steps)
        else:
            result = measure_peer(
                args.peer, args.shape, batch=args.batch, length=args.length, steps=args.steps, layers=args.layers
            )
    print(json.dumps(result))


def measure_peer(peer: str, shape: Path, *, batch: int, length: int, steps: int, layers: int = 0) -> dict[str, Any]:
    """Seconds a step and peak memory of a peer.

    Args:
        layers: builds only so many layers of full width, to be scaled by the caller; 0 is all of them.
    """
    if peer == "unsloth":
        import unsloth  # noqa: F401
    import torch

    from finetune.bench.measure import now, read_peak, reset_peak

    arch = MoeArch.from_config(read_json(shape / "config.json"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    built = layers or arch.layers
    model = _unsloth(shape, built, length) if peer == "unsloth" else _stock(peer, shape, built, device)
    ids = torch.randint(0, arch.vocab, (batch, length), device=device)
    step = _Step(model, ids)
    reset_peak(device)
    first = step()
    for _ in range(WARM_UP - 1):
        step()
    begun = now(device)
    for _ in range(steps):
        last = step()
    seconds = (now(device) - begun) / steps
    peak = read_peak(device)
    return {
        "peer": peer,
        "layers": built,
        "seconds_per_step": seconds,
        "peak_allocated_bytes": None if peak is None else peak.allocated,
        "peak_reserved_bytes": None if peak is None else peak.reserved,
        "losses": [float(first), float(last)],
    }


def measure_generate(shape: Path, *, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Tokens a second of transformers' `generate`: `steps` further tokens, beyond what the first two cost."""
    import torch

    from finetune.bench.measure import now

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = _config(shape, 0)
    model: Any = _quantized_model(config, device).eval()
    ids = torch.randint(3, config.vocab_size, (batch, length), device=device)

    def seconds(tokens: int) -> float:
        begun = now(device)
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return now(device) - begun

    seconds(2)
    taken = seconds(2 + steps) - seconds(2)
    return {"peer": "parametrization", "batch": batch, "context": length, "tokens_per_second": batch * steps / taken}


class _Step:
    """Forward, backward, clip, optimizer, as transformers' Trainer does them."""

    def __init__(self, model: nn.Module, ids: Tensor):
        import torch

        self.model, self.ids = model, ids
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, weight_decay=0.0, fused=ids.is_cuda)
        model.train()

    def __call__(self) -> Tensor:
        import torch

        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.ids.is_cuda):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


# ---- transformers, bitsandbytes and PEFT --------------------------------------------------------------------------


def _stock(peer: str, shape: Path, layers: int, device: torch.device) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if peer == "liger":
        _patch_with_liger()
    model: Any = _quantized_model(_config(shape, layers), device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.is_loaded_in_4bit = True  # PEFT then wraps Linear4bit by its own layer for it
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **_LORA))


def _patch_with_liger() -> None:
    """Replaces transformers' Mixtral classes; without SwiGLU, which knows only experts that are separate modules."""
    from liger_kernel.transformers import apply_liger_kernel_to_mixtral

    apply_liger_kernel_to_mixtral(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=False
    )


def _config(shape: Path, layers: int) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(shape), **({"num_hidden_layers": layers} if layers else {}))


def _quantized_model(config: PreTrainedConfig, device: torch.device) -> nn.Module:
    """The 4-bit model from random weights, one tensor at a time: the 16-bit model never exists."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from torch import nn
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def draw(shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02)

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    bnb = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=bnb)
    for layer in range(config.num_hidden_layers):
        experts = model.get_submodule(experts_path(layer))
        for projection in EXPERT_PROJECTIONS:
            shape = experts.get_parameter(projection).shape
            experts.register_parameter(projection, nn.Parameter(draw(shape), requires_grad=False))
            replace_parameter_4bit(experts, projection, compress_statistics=True, quant_type="nf4")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if isinstance(module, Linear4bit):
                quantized: Any = Params4bit(draw(parameter.shape), False, quant_type="nf4", compress_statistics=True)
                module.register_parameter(name, quantized.to(device))
            else:
                value = torch.ones_like(parameter, device=device) if parameter.dim() == 1 else draw(parameter.shape)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.tie_weights()
    return model


# ---- Unsloth ------------------------------------------------------------------------------------------------------


def _unsloth(shape: Path, layers: int, length: int) -> nn.Module:
    """Unsloth quantizes while it loads, so it gets a 16-bit checkpoint of random weights: 2.9 GB a layer of disk."""
    import torch
    from transformers import AutoModelForCausalLM
    from unsloth import FastLanguageModel

    from finetune.bench.workload import copy_tokenizer

    with tempfile.TemporaryDirectory(prefix="finetune-peer-") as scratch:
        with torch.device("cuda"):
            whole: Any = AutoModelForCausalLM.from_config(_config(shape, layers), dtype=torch.bfloat16)
        whole.save_pretrained(scratch)
        del whole
        torch.cuda.empty_cache()
        copy_tokenizer(Path(scratch))
        model, _ = FastLanguageModel.from_pretrained(
            model_name=scratch, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True
        )
    return FastLanguageModel.get_peft_model(model, bias="none", use_gradient_checkpointing="unsloth", **_LORA)


if __name__ == "__main__":
    main()
