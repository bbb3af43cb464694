"""`finetune chat` on the bundled model, and what it says before it loads one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapter.adapter import load
from finetune.data.encoding import encoder_of
from finetune.moe.load import LoadedModel
from tests.conftest import REPOSITORY
from tests.running import Ran, run_finetune

MODEL = REPOSITORY / "recipes" / "tiny-mixtral" / "model"


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: object) -> Ran:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run_finetune("chat", *arguments, "--device", "cpu")


def greedy(loaded: LoadedModel, messages: list[dict[str, str]], tokens: int) -> str:
    """The answer by transformers' own forward pass, without a cache."""
    [row] = encoder_of(loaded.tokenizer).encode([messages], add_generation_prompt=True)  # type: ignore[list-item]
    ids: list[int] = row.ids.tolist()
    prompt = len(ids)
    model: Any = loaded.model
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    whole = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    asked = loaded.tokenizer.decode(ids[:prompt], skip_special_tokens=True)
    assert isinstance(whole, str)
    assert isinstance(asked, str)
    return whole.removeprefix(asked).strip()


def test_it_answers_as_the_model_does_and_saves_the_conversation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "said.jsonl"
    lines = f"Name a colour.\n/model none\nAnd another?\n{'too long ' * 50}\n/save {saved}\n"
    options = ("--system", "Be brief.", "--max-new-tokens", 6, "--max-length", 100)
    ran = chat(monkeypatch, lines, MODEL, *options)
    assert ran.status == 0
    assert "there is no model 'none'" in ran.stderr
    assert "the conversation no longer fits" in ran.stderr
    assert "fewer than 100" in ran.stderr
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    loaded = load(str(MODEL), device="cpu")
    assert answers == [greedy(loaded, messages[:2], 6), greedy(loaded, messages[:4], 6)]
    assert ran.stdout == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--temperature", -1), ("temperature is -1.0", "0 to 100")),
        (("--top-p", 0), ("top_p is 0.0", "above 0, at most 1")),
        (("--max-new-tokens", 0), ("max_new_tokens is 0", "1 or more")),
        (("--adapter", "tuned"), ("--adapter 'tuned' does not name an adapter", "NAME=PATH")),
        (("--adapter", "a=x", "--adapter", "a=y"), ("the name a is given to two adapters", "once")),
    ],
)
def test_a_mistake_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], says: tuple[str, ...]
) -> None:
    ran = chat(monkeypatch, "", MODEL, *arguments)
    assert ran.status == 2
    for words in ("error: ", *says):
        assert words in ran.stderr


def test_the_page_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.errors.find_spec", lambda name: None)
    ran = chat(monkeypatch, "", "no/such/model", "--ui")
    assert ran.status == 2
    assert "not installed: gradio, httptools" in ran.stderr
    assert "pip install -e '.[ui]'" in ran.stderr
