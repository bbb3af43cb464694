"""The Mistral v1 template against mistral-common, its refusals, and the choice of a template."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from finetune.data.chat import MISTRAL_V1, apply_template, encode
from finetune.errors import DataError

USER, ASSISTANT, SYSTEM = ({"role": role, "content": f"by {role}"} for role in ("user", "assistant", "system"))


def test_ids_equal_mistral_common_on_every_conversation(
    tokenizer: PreTrainedTokenizerBase, reference_conversations: list[dict[str, Any]]
) -> None:
    ids, _ = encode(tokenizer, [row["messages"] for row in reference_conversations])
    assert ids == [row["ids"] for row in reference_conversations]


def test_exactly_the_assistant_turns_are_marked(
    tokenizer: PreTrainedTokenizerBase, reference_conversations: list[dict[str, Any]]
) -> None:
    _, masks = encode(tokenizer, [row["messages"] for row in reference_conversations])
    for row, mask in zip(reference_conversations, masks, strict=True):
        expected = [0] * len(row["ids"])
        for start, end in row["assistant"]:
            assert row["ids"][end - 1] == tokenizer.eos_token_id
            expected[start:end] = [1] * (end - start)
        assert mask == expected, row["messages"]


def test_a_prompt_is_the_beginning_of_its_training_example(
    tokenizer: PreTrainedTokenizerBase, reference_conversations: list[dict[str, Any]]
) -> None:
    for row in reference_conversations:
        prompt: Any = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
        assert prompt["input_ids"] == row["ids"][: row["assistant"][-1][0]]


@pytest.mark.parametrize(
    ("messages", "number", "role", "expected"),
    [
        ([ASSISTANT], 1, "assistant", "user"),
        ([USER, USER, ASSISTANT], 2, "user", "assistant"),
        ([USER, ASSISTANT, ASSISTANT], 3, "assistant", "user"),
        ([SYSTEM, ASSISTANT], 2, "assistant", "user"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], 2, "system", "user"),
        ([USER, SYSTEM, ASSISTANT], 2, "system", "assistant"),
        ([{"role": "tool", "content": "x"}], 1, "tool", "user"),
    ],
)
def test_a_wrong_order_of_roles_is_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], number: int, role: str, expected: str
) -> None:
    with pytest.raises(TemplateError, match=f"message {number} has role {role} where .* wants {expected}"):
        tokenizer.apply_chat_template(messages)


def test_mistral_v1_is_put_on_a_tokenizer_without_template(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = None
    apply_template(own_tokenizer, "mistral-v1")
    assert own_tokenizer.chat_template == MISTRAL_V1


def test_mistral_v1_is_refused_where_the_tokenizer_splits_otherwise(own_tokenizer: PreTrainedTokenizerBase) -> None:
    # As transformers' LlamaTokenizer without `legacy` does: no space is put before the text after a special token.
    own_tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    own_tokenizer.chat_template = "before"
    with pytest.raises(DataError) as caught:
        apply_template(own_tokenizer, "mistral-v1")
    assert "<s> [ INST ] ▁a" in str(caught.value)
    assert "<s> ▁[ INST ] ▁a ▁[ / INST ] ▁b </s>" in str(caught.value)
    assert "data.template: model" in str(caught.value)
    assert own_tokenizer.chat_template == "before"


def test_the_models_own_template_must_mark_the_assistant(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="does not mark the assistant's text") as caught:
        apply_template(own_tokenizer, "model")
    assert "{% generation %}" in str(caught.value)
    assert "mistral-v1" in str(caught.value)


def test_the_models_own_template_must_exist(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template of its own") as caught:
        apply_template(own_tokenizer, "model")
    assert "data.template: mistral-v1" in str(caught.value)


def test_a_marked_template_of_the_model_is_kept(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own = "{% for m in messages %}{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% endfor %}"
    own_tokenizer.chat_template = own
    apply_template(own_tokenizer, "model")
    assert own_tokenizer.chat_template == own
