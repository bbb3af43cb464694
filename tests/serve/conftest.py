"""A small model that says something else with every token, which the shared one with its tied embeddings does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.conftest import TOKENIZER_FILES
from tests.serve.fake import MODEL


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random bf16 Mixtral with 2 layers and the bundled model's tokenizer; never written to."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
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
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL / name, folder / name)
    return folder
