"""What earlier code saved still loads, and answers as it did: `tests/recorded/`, made once by scripts/make_recorded.py.

A test that fails here says that a user's own folder no longer works. Making the folders again would hide that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from finetune.adapter.adapter import is_adapter, load
from finetune.moe import LoadedModel, hash_experts
from tests.running import run_finetune

RECORDED = Path(__file__).parent / "recorded"
BASE = RECORDED / "base"
TRUTH: dict[str, Any] = json.loads((RECORDED / "truth.json").read_text("utf-8"))
ADAPTERS = [name for name in TRUTH["folders"] if is_adapter(RECORDED / name)]


def open_recorded(folder: Path) -> LoadedModel:
    # Where the base was then, nobody has it.
    return load(str(folder), base_path=str(BASE) if is_adapter(folder) else None, device="cpu", dtype="float32")


def hash_of(folder: Path) -> dict[str, str]:
    return {
        name.removeprefix("base_model.model."): value
        for name, value in hash_experts(open_recorded(folder).model).items()
    }


def recorded_logits(name: str) -> torch.Tensor:
    """float32 [4 positions, vocabulary]"""
    with safe_open(RECORDED / "truth.safetensors", framework="pt") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("name", TRUTH["folders"])
def test_it_answers_as_it_did(name: str) -> None:
    truth = TRUTH["folders"][name]
    loaded = open_recorded(RECORDED / name)
    chat = [{"role": "user", "content": TRUTH["asked"]}]
    assert loaded.tokenizer.apply_chat_template(chat, return_dict=False) == truth["prompt"]
    tokens = torch.tensor([truth["prompt"] + truth["greedy"]])
    with torch.no_grad():
        logits = loaded.model(input_ids=tokens, use_cache=False).logits[0]
    first = len(truth["prompt"]) - 1
    assert logits[first:-1].argmax(-1).tolist() == truth["greedy"]
    # Bit-equal where they were made; another CPU adds in another order. Logits reach 6.
    torch.testing.assert_close(logits[-4:], recorded_logits(name), atol=2e-5, rtol=0)
    if "experts_sha256" in truth:
        assert hash_experts(loaded.model) == truth["experts_sha256"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_commands_read_it(name: str) -> None:
    folder = RECORDED / name
    inspected = run_finetune("adapter", "inspect", folder, "--json", "--base", BASE)
    assert inspected.status == 0, inspected.stderr
    answered = run_finetune(
        *("generate", folder, "--base", BASE, "--prompt", TRUTH["asked"], "--max-new-tokens", 8),
        *("--device", "cpu", "--json"),
    )
    assert answered.status == 0, answered.stderr
