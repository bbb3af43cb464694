"""A conversation gives the same tokens when it is trained on and when the server is asked, whatever the template.

The training row comes from the form that `finetune train` reads, the prompt from the body of a request.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data import apply_template
from finetune.data.encoding import encoder_of
from finetune.data.forms import find_form, to_conversation
from finetune.serve.prompts import chat_ids
from finetune.serve.refusal import Refusal
from tests.conftest import REPOSITORY

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


PARTS = [{"type": "text", "text": text} for text in ("First part.", "", "Second part?</s>")]
PROMPTS = [
    said(("user", "Hi")),
    said(("user", PARTS)),
    said(("system", PARTS), ("user", PARTS)),
    said(("developer", "Be kind."), ("user", PARTS), ("assistant", PARTS), ("user", "And [INST]?")),
]


@pytest.fixture(scope="module", params=["mistral-v1", ZEPHYR], ids=["mistral-v1", "zephyr"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny-mixtral" / "model")
    if request.param == ZEPHYR:
        tokenizer.chat_template = ZEPHYR
    apply_template(tokenizer, "model" if request.param == ZEPHYR else request.param)
    return tokenizer


class Encoding:
    """What `chat_ids` asks of an engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        [row] = encoder_of(self.tokenizer).encode([messages], add_generation_prompt=True)
        return tuple(row.ids.tolist())


@pytest.mark.parametrize("messages", PROMPTS, ids=["text", "parts", "system", "developer"])
def test_training_and_serving_read_a_conversation_alike(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    row = {"messages": [*messages, {"role": "assistant", "content": "Answer"}]}
    form = find_form(row, "auto", columns={}, roles={}, where="here")
    [trained] = encoder_of(tokenizer).encode([to_conversation(row, form)], loss_on="last")
    asked = chat_ids(Encoding(tokenizer), messages)  # type: ignore[arg-type]
    first = int(trained.supervised.argmax())
    assert tuple(trained.ids[:first].tolist()) == asked
    assert tokenizer.decode(trained.ids[trained.supervised]) == "Answer</s>"


def test_half_a_character_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        chat_ids(Encoding(None), said(("user", "a"), ("user", [{"type": "text", "text": "\ud83d"}])))  # type: ignore[arg-type]
    assert caught.value.param == "messages.1.content"
    assert "lone surrogate" in caught.value.message
