"""The Mistral v1 template against mistral-common, its refusals, and the choice of a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.data.chat import apply_template
from finetune.data.encoding import encoder_of
from finetune.data.rendering import CHATML, MISTRAL_V1, MISTRAL_V3, MISTRAL_V3_SPACED
from finetune.errors import DataError

USER, ASSISTANT, SYSTEM = ({"role": role, "content": f"by {role}"} for role in ("user", "assistant", "system"))


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of whole conversations, and beside them 1 for every token of the assistant's turns."""
    encoded = encoder_of(tokenizer).encode(conversations)
    return [row.ids.tolist() for row in encoded], [row.supervised.astype(int).tolist() for row in encoded]


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


def test_mistral_v1_writes_the_space_that_a_tokenizer_does_not(
    own_tokenizer: PreTrainedTokenizerBase, reference_conversations: list[dict[str, Any]]
) -> None:
    # As transformers' LlamaTokenizer without `legacy` does: no space is put before the text after a special token.
    own_tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    apply_template(own_tokenizer, "mistral-v1")
    ids, _ = encode(own_tokenizer, [row["messages"] for row in reference_conversations])
    assert ids == [row["ids"] for row in reference_conversations]


def test_mistral_v1_is_refused_where_the_tokenizer_splits_otherwise(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Lowercase()]
    )
    own_tokenizer.chat_template = "before"
    with pytest.raises(DataError) as caught:
        apply_template(own_tokenizer, "mistral-v1")
    assert "does not give the tokens of the Mistral V1 format: <s> [ inst ] ▁a" in str(caught.value)
    assert "<s> ▁[ INST ] ▁a ▁[ / INST ] ▁b </s>" in str(caught.value)
    assert "data.template: auto or model" in str(caught.value)
    assert own_tokenizer.chat_template == "before"
    with pytest.raises(DataError, match="no chat template of ours fits this tokenizer") as caught:
        apply_template(own_tokenizer, "auto")
    assert "data.template: model" in str(caught.value)


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


@pytest.mark.parametrize("spaced", [False, True])
def test_v3_ids_and_marks_equal_mistral_common(
    tokenizer_v3: PreTrainedTokenizerFast, conversations_v3: list[dict[str, Any]], spaced: bool
) -> None:
    if spaced:
        tokenizer_v3.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    assert apply_template(tokenizer_v3, "auto") == "mistral-v3"
    assert tokenizer_v3.chat_template == (MISTRAL_V3_SPACED if spaced else MISTRAL_V3)
    ids, masks = encode(tokenizer_v3, [row["messages"] for row in conversations_v3])
    for row, ours, mask in zip(conversations_v3, ids, masks, strict=True):
        assert ours == row["ids"], row["messages"]
        marked = [i for start, end in row["assistant"] for i in range(start, end)]
        assert [i for i, is_supervised in enumerate(mask) if is_supervised] == marked, row["messages"]


def test_v3_wants_roles_in_turn_and_its_control_tokens(
    tokenizer: PreTrainedTokenizerBase, tokenizer_v3: PreTrainedTokenizerFast
) -> None:
    apply_template(tokenizer_v3, "mistral-v3")
    with pytest.raises(TemplateError, match="message 2 has role user where the Mistral v3 format wants assistant"):
        tokenizer_v3.apply_chat_template([USER, USER])
    with pytest.raises(DataError, match=r"does not have the control tokens \[INST\] and \[/INST\]") as caught:
        apply_template(tokenizer, "mistral-v3")
    assert "data.template: auto" in str(caught.value)


def test_auto_takes_v1_for_mixtral_and_chatml_where_its_tokens_were_added(
    own_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert apply_template(own_tokenizer, "auto") == "mistral-v1"
    with pytest.raises(DataError, match=r"does not have the control tokens <\|im_start\|> and <\|im_end\|>"):
        apply_template(own_tokenizer, "chatml")
    assert own_tokenizer.chat_template == MISTRAL_V1
    own_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert apply_template(own_tokenizer, "auto") == "chatml"
    assert own_tokenizer.chat_template == CHATML
    [ids], [mask] = encode(own_tokenizer, [[SYSTEM, USER, ASSISTANT, USER, {**ASSISTANT, "content": "<|im_end|>"}]])
    assert own_tokenizer.decode(ids).startswith("<s><|im_start|> system\nby system<|im_end|> \n<|im_start|> user")
    assert ids.count(own_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    learnt = own_tokenizer.decode([token for token, is_supervised in zip(ids, mask, strict=True) if is_supervised])
    assert learnt == "by assistant<|im_end|><|im_end|><|im_end|>"


def test_a_jinja_file(own_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    before = own_tokenizer.chat_template
    for text, message in (
        (None, "cannot be read: .*No such file"),
        ("{% for m in messages %}\n{{ m['content'] }}\n{% endfo %}", "is not Jinja: .*endfo.*, line 3"),
        ("{{ raise_exception('never') }}", "refuses a conversation: never"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError: can only concatenate str"),
        ("{{ messages[0]['content'] }}{%- generation -%}x{%- endgeneration -%}", "marks 'ax' as the assistant's"),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
            "message 2 cannot be told .*'assistant' stands before the answer and is not in the generation prompt",
        ),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            apply_template(own_tokenizer, str(file))
        assert str(file) in str(caught.value)
        assert "fix: " in str(caught.value)
        assert own_tokenizer.chat_template == before
    file.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    assert apply_template(own_tokenizer, str(file)) == str(file)
    with pytest.raises(DataError, match="unknown chat template 'mistral'") as caught:
        apply_template(own_tokenizer, "mistral")
    assert "auto, mistral-v1, mistral-v3, chatml, model, or a path that ends in .jinja" in str(caught.value)
