"""Conversations with tools: one form for all that data sets write, and the tokens of `apply_chat_template`."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.check.fix import repair
from finetune.data.encoding import Refused, encoder_of
from finetune.data.forms import parse, to_conversation
from finetune.data.messages import tools_of
from finetune.data.recognition import find_form
from finetune.data.rows import RawChunk, RowFault
from finetune.data.selection import content_key
from finetune.data.sources import Source, open_source
from finetune.data.worker import Fitter
from tests.data.conftest import MODEL

# The layout of Hermes and Qwen: schemas in the system turn, calls between tags, what tools answer as the user's turn.
HERMES = """{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{%- endif %}
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{%- elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{%- elif m.role == 'assistant' %}
<|im_start|>assistant
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{%- elif m.role != 'system' %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Zürich </s>"}}}
ROW: dict[str, Any] = {
    "tools": [WEATHER],
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"sun": true}'},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "</s> 20 degrees"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ],
}


@pytest.fixture(scope="module")
def hermes() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = HERMES
    return tokenizer


def conversation_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return to_conversation(row, find_form(row, "auto", columns={}, roles={}, where="x"))


def variants() -> list[dict[str, Any]]:
    """The same conversation as data sets write it."""
    as_text = json.loads(json.dumps(ROW))
    as_text["tools"] = json.dumps(ROW["tools"])
    function = as_text["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    arrow = json.loads(json.dumps(as_text))
    for message in arrow["messages"]:  # every key in every turn, as Arrow has it
        for key in ("tool_calls", "tool_call_id", "name", "reasoning_content"):
            message.setdefault(key, None)
    flat = json.loads(json.dumps(ROW))
    flat["tools"] = [WEATHER["function"]]
    return [ROW, as_text, arrow, flat]


def test_all_forms_are_one_conversation() -> None:
    first, *others = map(conversation_of, variants())
    assert others == [first] * 3
    assert first[1]["tool_calls"] == [CALL]
    assert [message.get("tools") is not None for message in first] == [True] + [False] * 6


def test_sharegpt_with_calls_in_turns_of_their_own() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rom"}})},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    }
    said = conversation_of(row)
    assert [message["role"] for message in said] == ["user", "assistant", "tool", "assistant"]
    assert said[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rom"}}
    assert said[0]["tools"] == [WEATHER]


def test_tokens_are_those_of_apply_chat_template(hermes: PreTrainedTokenizerBase) -> None:
    plain = json.loads(json.dumps(ROW).replace("</s>", "{s}"))  # typed control tokens: see the next test
    wanted = hermes.apply_chat_template(
        [{**m, "content": m["content"] or ""} for m in plain["messages"]], tools=plain["tools"], return_dict=False
    )
    [row] = encoder_of(hermes).encode([conversation_of(plain)])
    assert row.ids.tolist() == wanted
    assert row.cut == ()


def test_what_is_learnt_is_what_the_assistant_wrote(hermes: PreTrainedTokenizerBase) -> None:
    [row] = encoder_of(hermes).encode([conversation_of(ROW)])
    learnt = hermes.decode(row.ids[row.supervised])
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich </s>"}}</tool_call><|im_end|>'
    assert learnt == f"<think>Look it up.</think>{call}Sunny.<|im_end|>Welcome.<|im_end|>"
    # The `</s>` that a tool and an argument hold are text.
    assert int(hermes.eos_token_id or 0) not in row.ids.tolist()


def test_flags_and_prompts(hermes: PreTrainedTokenizerBase) -> None:
    row = json.loads(json.dumps(ROW))
    row["messages"][1]["train"] = False
    [encoded] = encoder_of(hermes).encode([conversation_of(row)])
    assert "tool_call" not in hermes.decode(encoded.ids[encoded.supervised])
    asked = conversation_of(ROW)[:4]
    [prompt] = encoder_of(hermes).encode([asked], add_generation_prompt=True)
    [whole] = encoder_of(hermes).encode([conversation_of(ROW)[:5]])
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{%- for call in m.tool_calls or [] %}", "{%- for call in [] %}"), "the chat template does not write calls"),
        (("{{ m.content }}</tool_response>", "</tool_response>"), "does not write what tools answer"),
    ],
)
def test_a_template_that_leaves_tools_out(
    hermes: PreTrainedTokenizerBase, change: tuple[str, str], reason: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = HERMES.replace(*change)
    [refused] = encoder_of(tokenizer).encode_each([conversation_of(ROW)])
    assert isinstance(refused, Refused)
    assert reason in str(refused)
    assert "choose a data.template that does" in str(refused)


def test_a_template_that_does_not_list_them_only_warns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}A{% else %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    row = {"tools": [WEATHER], "messages": [ROW["messages"][0], {"role": "assistant", "content": "b", "thinking": "c"}]}
    [encoded] = encoder_of(tokenizer).encode([conversation_of(row)])
    left_out = "which the chat template leaves out"
    assert encoded.cut == (f"`thinking` of turns, {left_out}", f"`tools`, {left_out}")


def test_other_calls_are_another_conversation() -> None:
    other = json.loads(json.dumps(ROW).replace("Zürich", "Rom").replace("Z\\u00fcrich", "Rom"))
    assert content_key(conversation_of(other)) != content_key(conversation_of(ROW))
    assert content_key(conversation_of(variants()[1])) == content_key(conversation_of(ROW))


def test_rows_of_a_long_conversation_keep_its_tools(hermes: PreTrainedTokenizerBase) -> None:
    conversation = conversation_of(ROW)
    encoder = encoder_of(hermes)
    [whole] = encoder.encode([conversation])
    fitter = Fitter(encoder.encode, len(whole.ids) - 1, "split")
    [rows] = fitter.fit([conversation], [whole])
    [first, second] = [hermes.decode(row.ids) for row in rows]
    assert first.count("<tools>") == second.count("<tools>") == 1
    assert "Sunny." in first, "what a tool answers and what is said to it stay together"
    assert "Welcome." in second
    assert "tool_response" not in second


def test_a_corrected_row_keeps_them() -> None:
    row = json.loads(json.dumps(ROW))
    row["messages"].insert(5, {"role": "system", "content": "Be brief."})
    row["messages"].append({"role": "user", "content": "Bye"})
    mended, done = repair(row, find_form(row, "auto", columns={}, roles={}, where="x"))
    assert done == ["system message moved to the front", "unanswered end dropped"]
    assert mended[0]["tools"] == [WEATHER]
    assert [message["role"] for message in mended].count("tool") == 2
    assert mended[2]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[", "`tools` is a string that is not JSON"),
        ({"a": 1}, "`tools` is a mapping, not a list of tools"),
        ([{}], "`tools` holds a mapping that does not name a function"),
        ([5], "`tools` holds a number that does not name a function"),
    ],
)
def test_tools_that_are_none(tools: Any, reason: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": tools}
    form = find_form({**row, "tools": []}, "auto", columns={}, roles={}, where="x")
    assert parse(RawChunk(0, 1, values=[row]), form).refused == [(1, reason)]
    assert tools_of("", "tools") == tools_of(None, "tools") == tools_of("[]", "tools") == []


def test_a_tool_that_nobody_called() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}
    with pytest.raises(RowFault, match="a tool answers where nothing called it"):
        conversation_of(row)


def test_nothing_of_it_changes_other_rows(hermes: PreTrainedTokenizerBase) -> None:
    plain = [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b", "train": True}]
    [row] = encoder_of(hermes).encode([plain])
    assert np.count_nonzero(row.supervised) == 2  # b and the end of its turn


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("weather", "w\ud800"), "`tools` is not valid Unicode"),
        (("Zürich", "\ud800"), "a tool call is not valid Unicode"),
        (("Look it up.", "\udfff"), "`reasoning_content` of a turn is not valid Unicode"),
    ],
)
def test_a_lone_surrogate_beside_the_content(change: tuple[str, str], reason: str) -> None:
    row = json.loads(json.dumps(ROW, ensure_ascii=False).replace(*change))
    with pytest.raises(RowFault, match=reason):
        conversation_of(row)


def test_a_value_that_json_does_not_have() -> None:
    row = json.loads(json.dumps(ROW))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"day": date(2026, 12, 1)}  # as Parquet holds it
    with pytest.raises(RowFault, match="a tool call holds a value that JSON does not have"):
        conversation_of(row)


@pytest.mark.parametrize("deep", [60, 900, 100_000])
def test_arguments_that_are_nested_deeply(deep: int, hermes: PreTrainedTokenizerBase) -> None:
    row = json.loads(json.dumps(ROW))
    text = '{"a":' * deep + "1" + "}" * deep
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = text
    if deep == 60:
        [encoded] = encoder_of(hermes).encode([conversation_of(row)])
        assert text in hermes.decode(encoded.ids).replace(" ", "")
    else:
        with pytest.raises(RowFault, match=r"nested deeper than 64 levels|nested too deeply"):
            conversation_of(row)


def test_parquet_trains_no_argument_that_nobody_wrote(tmp_path: Path) -> None:
    """A column of structs has every key in every struct, null where a row has none."""
    rows = [json.loads(json.dumps(ROW)) for _ in range(2)]
    other = {"name": "trains", "arguments": {"to": "Rom", "days": [1]}}
    rows[1]["messages"][1]["tool_calls"][0]["function"] = other
    properties = {"to": {"type": "string"}, "days": {"type": "array"}}
    rows[1]["tools"][0]["function"] = {"name": "trains", "parameters": {"type": "object", "properties": properties}}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    filled = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["to"] is None
    [chunk] = [chunk for chunk, _ in open_source(Source(str(tmp_path / "rows.parquet"))).chunks(0)]
    assert [conversation_of(row) for row in chunk.values or ()] == [conversation_of(row) for row in rows]


def test_ids_that_are_numbers() -> None:
    row = json.loads(json.dumps(ROW).replace('"c1"', "17"))
    as_text = json.loads(json.dumps(ROW).replace('"c1"', '"17"'))
    assert conversation_of(row) == conversation_of(as_text)
