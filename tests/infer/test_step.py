"""A decoding step against the model's own forward over the whole sequence, for every family and kind of adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.adapter.lora import add_adapters, add_attention_lora, save_adapter
from finetune.infer.pages import PAGE, PagePool
from finetune.infer.prefill import prefill
from finetune.infer.rotary import RotaryTables
from finetune.infer.step import DecodeStep
from finetune.moe import Moe4bitConfig
from finetune.moe.arch import MoeArch
from finetune.moe.attention import read_packing
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base
from tests.models import tiny_model

LENGTHS = (PAGE + 3, 7, 1)
# Measured: 1e-5 of logits around 10, in float32.
TOLERANCE = 1e-4


def quantized(family: str, folder: Path, attention: Any = "nf4", **overrides: Any) -> Any:
    tiny_model(family, max_position_embeddings=512, **overrides).save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Moe4bitConfig(attention), dtype=torch.float32, attn_implementation="varlen"
    )
    read_packing(model)
    return model.eval()


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def rows_logits(
    causal: Any,
    arch: MoeArch,
    adapters: list[str],
    selectors: list[int],
    ids: list[list[int]],
    pool: PagePool,
    pages: Any,
) -> Tensor:
    """Logits after each whole row: its last token by a step, what is before by a prompt's forward."""
    step = DecodeStep(causal, arch, adapters, RotaryTables(causal.model, 512))
    table = torch.zeros(len(ids), 4, dtype=torch.int32)
    for row, own in enumerate(pages):
        table[row, : len(own)] = torch.tensor(own)
    return step(
        torch.tensor([row[-1] for row in ids]),
        torch.tensor([len(row) - 1 for row in ids], dtype=torch.int32),
        table,
        torch.tensor(selectors, dtype=torch.int32),
        pool,
    )


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {}),
        ("mixtral", {"sliding_window": 40}),
        ("qwen3_moe", {}),
        ("olmoe", {"clip_qkv": 0.5}),
    ],
)
@pytest.mark.parametrize("attention", ["nf4", "16bit"])
def test_equals_the_models_forward(family: str, overrides: dict[str, Any], attention: str, tmp_path: Path) -> None:
    model = quantized(family, tmp_path, attention, **overrides)
    arch = MoeArch.from_config(model.config.to_dict())
    pool = PagePool(arch, 12, torch.float32, torch.device("cpu"))
    ids = prompts(arch.vocab)
    pages: list[list[int]] = [[] for _ in ids]
    assert all(pool.allocate(own, len(row) + 2) for own, row in zip(pages, ids, strict=True))
    after_prompt = prefill(model, ids, pages, pool, RotaryTables(model.model, 512))
    expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in ids])
    torch.testing.assert_close(after_prompt, expected, atol=TOLERANCE, rtol=0)
    longer = [[*row, 5] for row in ids]
    found = rows_logits(model, arch, [], [0, 0, 0], longer, pool, pages)
    expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in longer])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (pool.keys[0][0] == 0).all(), "page 0 belongs to nobody"


@torch.inference_mode()
def test_each_row_goes_by_its_own_adapter(small_mixtral: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"r": 4},
        "dora": {"r": 8, "use_dora": True, "target_modules": ("q_proj", "o_proj")},
        "routers": {"r": 2, "use_rslora": True, "router": True},
    }
    for seed, (name, options) in enumerate(kinds.items()):
        loaded = load_base(BaseSpec(str(small_mixtral)), device="cpu")
        with torch.inference_mode(False):
            adapter = add_attention_lora(loaded.model, loaded.arch, **options)
            generator = torch.Generator().manual_seed(seed)
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        (tmp_path / name).mkdir()
        save_adapter(adapter, tmp_path / name)
    loaded = load_base(BaseSpec(str(small_mixtral)), device="cpu")
    model: Any = add_adapters(loaded.model, {name: tmp_path / name for name in kinds})
    causal, arch = model.get_base_model(), loaded.arch
    pool = PagePool(arch, 20, torch.float32, loaded.device)
    rotary = RotaryTables(causal.model, 512)
    row = [*prompts(arch.vocab)[1], 9]
    names = [None, *kinds]
    pages: list[list[int]] = [[] for _ in names]
    expected = []
    for name, own in zip(names, pages, strict=True):
        pool.allocate(own, len(row))
        if name is None:
            with model.disable_adapter():
                prefill(causal, [row[:-1]], [own], pool, rotary)
                expected.append(causal(torch.tensor([row])).logits[0, -1])
        else:
            model.set_adapter(name)
            prefill(causal, [row[:-1]], [own], pool, rotary)
            expected.append(causal(torch.tensor([row])).logits[0, -1])
    found = rows_logits(causal, arch, list(kinds), [0, 1, 2, 3], [row] * 4, pool, pages)
    torch.testing.assert_close(found, torch.stack(expected), atol=5 * TOLERANCE, rtol=0)
    distances = [float((expected[0] - other).abs().max()) for other in expected[1:]]
    assert min(distances) > 0.05, "the adapters must differ for the test to mean anything"
