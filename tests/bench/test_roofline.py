"""FLOPs of the formula against those that torch counts while a model really runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from finetune.bench.roofline import forward_flops, roofline_tokens_per_second, training_flops
from finetune.moe.arch import MoeArch
from tests.conftest import REPOSITORY

CONFIG = MixtralConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=5,
    num_experts_per_tok=2,
)


def counted(*, frozen: tuple[str, ...]) -> tuple[int, int]:
    """Products' FLOPs a token, forward and backward, attention scores left out, as torch counts them."""
    torch.manual_seed(0)
    config = MixtralConfig.from_dict(CONFIG.to_dict())
    config._experts_implementation = "eager"
    model: Any = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    ids = torch.randint(0, CONFIG.vocab_size, (2, 7))

    def products(counter: FlopCounterMode) -> int:
        by_operation = counter.get_flop_counts()["Global"]
        return sum(flops for operation, flops in by_operation.items() if "attention" not in str(operation))

    with FlopCounterMode(display=False) as forward:
        loss = model(ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return products(forward) // ids.numel(), products(backward) // ids.numel()


def test_frozen_weights_cost_two_forward_passes() -> None:
    arch = MoeArch.from_config(CONFIG.to_dict())
    forward, backward = counted(frozen=("proj", "gate", "head", "embed"))  # the norms train
    assert forward == forward_flops(arch)
    assert forward + backward == training_flops(arch)


def test_full_weights_add_their_own_gradients() -> None:
    forward, backward = counted(frozen=("experts", "gate"))
    assert forward + backward == training_flops(MoeArch.from_config(CONFIG.to_dict()), full_weights=True)


def test_mixtral_takes_51_gflop_a_token() -> None:
    config = json.loads((REPOSITORY / "recipes" / "mixtral-8x7b" / "shape" / "config.json").read_text())
    assert training_flops(MoeArch.from_config(config)) == pytest.approx(51e9, rel=1e-3)


def test_roofline_is_products_and_two_passes_over_the_experts() -> None:
    arch = MoeArch.from_config(CONFIG.to_dict())
    weights = 3 * 5 * 3 * 32 * 48
    bytes_moved = 2 * weights * (0.5 + 1 / 64 + 4 / (64 * 256) + 2)
    seconds = 100 * 1000 / 1e6 + bytes_moved / 1e5
    rate = roofline_tokens_per_second(arch, 100, flops_per_token=1000, gemm_rate=1e6, copy_rate=1e5)
    assert rate == pytest.approx(100 / seconds)
