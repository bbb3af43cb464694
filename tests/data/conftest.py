"""The bundled Mixtral tokenizer, and what mistral-common says about it (made by scripts/build_tokenizer.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
FIXTURE = Path(__file__).parent / "fixtures" / "mistral_v1.jsonl"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """To be read only; a test that changes it takes `own_tokenizer`."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def own_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def fixture_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def reference_conversations(fixture_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{messages, ids, assistant: [[start, end), ...]} by mistral-common."""
    rows = [row for row in fixture_rows if "messages" in row]
    assert len(rows) > 300
    return rows


@pytest.fixture(scope="session")
def reference_texts(fixture_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{text, ids} by mistral-common."""
    rows = [row for row in fixture_rows if "text" in row]
    assert len(rows) > 100
    return rows
