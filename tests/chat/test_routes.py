"""Which expert a token goes to first: against transformers' own router logits, and texts spelled out in stretches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.adapter.adapter import load
from finetune.chat.routes import pieces_of, routed
from finetune.data.encoding import encoder_of, token_pieces
from finetune.moe.load import LoadedModel
from tests.conftest import REPOSITORY

MODEL = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
TEXT = "def f(x):\n    return x  # größer als 日本語 😀👩‍👩‍👧 שלום\n" * 18


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(str(MODEL), device="cpu")


def test_the_first_expert_is_the_most_probable_one(loaded: LoadedModel) -> None:
    asked = []

    def run(function: Any, model: str) -> Any:
        asked.append(model)
        return function(loaded)

    engine: Any = SimpleNamespace(run=run)
    ids = [1, *encoder_of(loaded.tokenizer).encode_text(TEXT[:200])]
    made = routed(engine, ids, "tuned")
    with torch.no_grad():
        truth: Any = loaded.model(input_ids=torch.tensor([ids]), output_router_logits=True)
    assert asked == ["tuned"]
    assert made.first == [logits.argmax(-1).tolist() for logits in truth.router_logits]
    assert made.experts == loaded.arch.experts
    assert "".join(made.pieces) == f"<s> {TEXT[:200]}"


def test_long_texts_are_spelled_out_as_short_ones_are(loaded: LoadedModel) -> None:
    ids = [1, *encoder_of(loaded.tokenizer).encode_text(TEXT)]
    assert len(ids) > 600  # three stretches
    for cut in range(8):
        assert pieces_of(loaded.tokenizer, ids[cut:]) == token_pieces(loaded.tokenizer, ids[cut:])
