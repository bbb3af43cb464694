"""Logits, gradients and generated tokens of models whose experts are 4-bit.

Truth: plain transformers models that hold the dequantized weights (`dequantized_twin`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import (
    FAMILIES,
    LAYERS,
    dequantized_twin,
    tiny_model,
    tokens,
)
from tests.moe.loading import (
    QKVO,
    STORAGES,
    add_lora,
    assert_same_bits,
    copy_lora,
    load,
    logits,
    lora_gradients,
    relative_error,
)

# Relative error of the logits against the twin with the dequantized weights, float32: measured 0.0 (the same products
# in the same order); another BLAS may order its sums otherwise. The quantization itself moves them by
# 0.15 (attention 16-bit) to 0.38.
LOGITS_LIMIT = 1e-5


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"norm_topk_prob": False}),
        ("olmoe", {"clip_qkv": 0.5}),
    ],
    ids=str,
)
def test_logits_equal_the_dequantized_twin(
    tmp_path: Path, family: str, overrides: dict[str, Any], attention: str
) -> None:
    plain = tiny_model(family, **overrides)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, attention)
    expected = logits(dequantized_twin(model))
    assert relative_error(logits(model), expected) < LOGITS_LIMIT
    assert relative_error(logits(plain), expected) > 0.1, "the limit would not notice unquantized experts"
    if "norm_topk_prob" in overrides:
        model.config.norm_topk_prob = not model.config.norm_topk_prob
        assert relative_error(logits(dequantized_twin(model)), expected) > 0.01, "the router's normalization is unseen"


@pytest.mark.parametrize("attention", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_equal_the_dequantized_twin(tmp_path: Path, family: str, attention: str) -> None:
    """Every LoRA gradient, the first layer's included, which come back through two layers of frozen experts and
    through the routing weights. Measured in float32: at most 9e-7 relative."""
    tiny_model(family).save_pretrained(tmp_path)
    quantized = load(tmp_path, attention)
    twin = add_lora(dequantized_twin(quantized))
    model = add_lora(quantized)
    copy_lora(model, twin)
    found, expected = lora_gradients(model), lora_gradients(twin)
    assert found.keys() == expected.keys()
    assert len(found) == LAYERS * len(QKVO) * 2
    for name, grad in expected.items():
        assert grad.norm() > 0
        assert relative_error(found[name], grad) < 1e-5, name

    # The routing weights carry a part of them: without it, the first layer's gradients are clearly others.
    for layer in twin.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1].detach(), out[2]))
    detached = lora_gradients(twin)
    first = [name for name in expected if ".layers.0." in name]
    assert all(relative_error(detached[name], expected[name]) > 0.01 for name in first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, use_reentrant: bool) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    model = add_lora(load(tmp_path))
    expected = lora_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_bits(lora_gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(tmp_path: Path, family: str) -> None:
    """Greedy tokens equal those of the twin, with the cache and without."""
    tiny_model(family).save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    prompt = tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert found.shape == (2, 13)
    for use_cache in (True, False):
        expected = dequantized_twin(model).generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **settings
        )
        assert torch.equal(found, expected)
