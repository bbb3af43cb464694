"""The bundled Mixtral tokenizer and the v3 one made of it, and what mistral-common says about them (see fixtures/)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
FIXTURE = Path(__file__).parent / "fixtures" / "mistral_v1.jsonl"
FIXTURE_V3 = Path(__file__).parent / "fixtures" / "mistral_v3.jsonl"
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """To be read only; a test that changes it takes `own_tokenizer`."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def own_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Conversations through a file, the forms and the encoder: rows with input_ids and labels, one for each."""
    monkeypatch.setenv("MOE_QLORA_CACHE", str(tmp_path / "cache"))

    def label(
        conversations: Iterable[Any], tokenizer: PreTrainedTokenizerBase, *, processes: int = 1
    ) -> list[dict[str, Any]]:
        path = tmp_path / "conversations.jsonl"
        lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
        path.write_text("".join(lines), encoding="utf-8")
        made = encode_source(Reading(Source(str(path))), tokenizer, Supervision(), processes=processes)
        assert made.ledger.used == len(lines), made.ledger
        return list(made.dataset)

    return label


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


@pytest.fixture(scope="session")
def fixture_v3() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FIXTURE_V3.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def conversations_v3(fixture_v3: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{messages, ids, assistant: [[start, end), ...]} of the v3 format, by mistral-common."""
    assert len(fixture_v3) > 500
    return fixture_v3[1:]


@pytest.fixture
def tokenizer_v3(fixture_v3: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """The tokenizer of Mixtral 8x22B, without a template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        shift = importlib.import_module("v3_tokenizer").shift
    backend = shift((MODEL / "tokenizer.json").read_text(encoding="utf-8"), fixture_v3[0]["controls"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
