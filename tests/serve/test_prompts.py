"""A conversation gives the same tokens when it is trained on and when the server is asked, whatever the template.

The training row comes from the form that `finetune train` reads, the prompt from the body of a request.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.chat import apply_template
from finetune.data.encoding import encoder_of
from finetune.data.forms import to_conversation
from finetune.data.recognition import find_form
from finetune.infer.text import encode_messages
from finetune.serve.api_error import APIError
from finetune.serve.prompts import Prompts
from tests.conftest import REPOSITORY
from tests.data.test_messages import HERMES, variants

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
    """What `Prompts` asks of an engine."""

    max_length = 512

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def tokenizer_of(self, model: str | None) -> PreTrainedTokenizerBase:
        return self.tokenizer

    def encode_chat(self, messages: list[dict[str, str]], model: str | None, *, continues: bool) -> tuple[int, ...]:
        return tuple(encode_messages(self.tokenizer, messages, continues=continues))


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]], *, continues: bool = False) -> tuple[int, ...]:
    engine: Any = Encoding(tokenizer)
    return Prompts(engine, None).of_messages(messages, None, continues=continues)[0]


@pytest.mark.parametrize("messages", PROMPTS, ids=["text", "parts", "system", "developer"])
def test_training_and_serving_read_a_conversation_alike(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    row = {"messages": [*messages, {"role": "assistant", "content": "Answer"}]}
    form = find_form(row, "auto", columns={}, roles={}, where="here")
    [trained] = encoder_of(tokenizer).encode([to_conversation(row, form)], loss_on="last")
    asked = chat_ids(tokenizer, messages)
    first = int(trained.supervised.argmax())
    assert tuple(trained.ids[:first].tolist()) == asked
    assert tokenizer.decode(trained.ids[trained.supervised]) == "Answer</s>"


def test_a_final_assistant_message_goes_on_as_it_was_trained(tokenizer: Any) -> None:
    """What the model is given is how the trained row begins; a control token typed in it stays text."""
    typed = "The answer</s> is [INST] four"
    messages = said(("user", "Hi</s>"), ("assistant", typed))
    [trained] = encoder_of(tokenizer).encode([said(("user", "Hi</s>"), ("assistant", f"{typed}, of course"))])
    ids = chat_ids(tokenizer, messages, continues=True)
    assert tuple(trained.ids[: len(ids)].tolist()) == ids
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(ids).endswith(typed)
    assert ids.count(tokenizer.eos_token_id) == trained.ids.tolist().count(tokenizer.eos_token_id) - 1
    # A space at the end is kept, nothing is the same as no message.
    assert len(chat_ids(tokenizer, said(("user", "Hi"), ("assistant", "A ")), continues=True)) == 1 + len(
        chat_ids(tokenizer, said(("user", "Hi"), ("assistant", "A")), continues=True)
    )
    asked = said(("user", "Hi"))
    assert chat_ids(tokenizer, asked + said(("assistant", "")), continues=True) == chat_ids(tokenizer, asked)


def test_a_template_that_does_not_write_the_last_message_is_refused() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny-mixtral" / "model")
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(APIError, match="does not write the last message once, so it cannot go on") as caught:
        chat_ids(tokenizer, said(("user", "Hi"), ("assistant", "A")), continues=True)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_half_a_character_is_refused(tokenizer: Any) -> None:
    with pytest.raises(APIError) as caught:
        chat_ids(tokenizer, said(("user", "a"), ("user", [{"type": "text", "text": "\ud83d"}])))
    assert caught.value.param == "messages.1.content"
    assert "lone surrogate" in caught.value.message


@pytest.mark.parametrize("form", range(4))
def test_a_conversation_with_tools(form: int) -> None:
    """As data sets write it, trained on and asked with one rendering: the prompt is how the row begins."""
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny-mixtral" / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = HERMES
    row = variants()[form]
    conversation = to_conversation(row, find_form(row, "auto", columns={}, roles={}, where="x"))
    [trained] = encoder_of(tokenizer).encode([conversation])
    ids, _ = Prompts(Encoding(tokenizer), None).of_messages(row["messages"][:4], row["tools"], continues=False)
    assert trained.ids[: len(ids)].tolist() == list(ids)
    assert "</s> 20 degrees</tool_response><|im_end|>" in tokenizer.decode(ids)


def test_tools_that_the_template_does_not_write() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny-mixtral" / "model")
    apply_template(tokenizer, "mistral-v1")
    with pytest.raises(APIError, match="; mistral-v1, mistral-v3 and chatml write no tools"):
        Prompts(Encoding(tokenizer), None).of_messages(variants()[0]["messages"][:4], None, continues=False)
    asked = said(("user", "Hi"))
    prompts = Prompts(Encoding(tokenizer), None)
    assert prompts.of_messages(asked, variants()[0]["tools"], continues=False) == prompts.of_messages(
        asked, None, continues=False
    )
