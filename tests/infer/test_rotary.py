"""Every rope type: the tokens of transformers' own generate, at lengths on both sides of the original one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from finetune.infer.engine import Engine
from finetune.infer.pages import page_bytes
from finetune.infer.request import Request, Sampling
from finetune.infer.residency import EngineSettings
from finetune.moe.arch import MoeArch
from finetune.moe.load import read_config
from tests.conftest import TOKENIZER_FILES
from tests.infer.test_batch import answers, tokens

ORIGINAL = 40
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": ORIGINAL,
    },
}


# Those that depend on the length of a pass in every run, the others now and then.
@pytest.mark.parametrize(
    "rope", [name if name in ("dynamic", "longrope") else pytest.param(name, marks=pytest.mark.slow) for name in ROPES]
)
def test_tokens_are_generates(rope: str, small_mixtral: Path, tmp_path: Path) -> None:
    """Prompts that share a pass; one goes beyond the original length while it is answered, and one makes room then."""
    torch.manual_seed(0)
    parameters = {"rope_theta": 10000.0, "rope_type": rope, **ROPES[rope]}
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        max_position_embeddings=160,
        rope_parameters=parameters,
    )
    model: Any = MixtralForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        shutil.copy(small_mixtral / name, tmp_path)
    prompts = [tuple(range(100, 100 + length)) for length in (8, ORIGINAL - 4, ORIGINAL, ORIGINAL + 1)]
    count = 30
    pages = 5 * page_bytes(MoeArch.from_config(read_config(str(tmp_path))), torch.float32) / 2**30
    settings = EngineSettings(max_batch=4, max_length=128, kv_gib=pages)
    with Engine.load(str(tmp_path), device="cpu", settings=settings) as engine:
        found = answers(engine, [Request(ids, Sampling(count, ignore_eos=True)) for ids in prompts])
        assert engine.stats().preempted > 0

        def generated(loaded: Any, ids: tuple[int, ...]) -> list[int]:
            made = loaded.model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            return made[0, len(ids) :].tolist()

        for ids, events in zip(prompts, found, strict=True):
            assert tokens(events) == engine.run(lambda loaded, ids=ids: generated(loaded, ids)), len(ids)  # type: ignore[misc]
