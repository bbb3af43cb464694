"""A sample of every form, as the public data sets have it, and every way in which a row can be wrong: one text each.

The samples are the beginnings of rows of the sets named beside them, layout and odd columns kept.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.data.forms import advice, danger, matters, parse, to_conversation, unread_columns
from finetune.data.recognition import find_form
from finetune.data.rows import Message, RawChunk, RowFault
from finetune.data.turns import Form
from finetune.errors import DataError


def form_of(row: dict[str, Any], wanted: Any = "auto", **maps: dict[str, str]) -> Form:
    return find_form(row, wanted, columns=maps.get("columns", {}), roles=maps.get("roles", {}), where="here.jsonl")


def read(row: dict[str, Any], wanted: Any = "auto", **maps: dict[str, str]) -> list[tuple[str, str, bool]]:
    conversation = to_conversation(row, form_of(row, wanted, **maps))
    return [(message["role"], message["content"], message["train"]) for message in conversation]


def fault_of(row: Any, form: Form) -> str:
    with pytest.raises(RowFault) as caught:
        to_conversation(row, form)
    return str(caught.value)


def user(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "b", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any = "{}") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES = form_of({"messages": [user(), assistant()]})
FUNCTION_CALL = "a turn has a `function_call`; write it as `tool_calls`: [{function: {name, arguments}}]"


# ---- samples of public sets -----------------------------------------------------------------------------------------

GUANACO = {  # timdettmers/openassistant-guanaco
    "text": '### Human: Can you write a short introduction about the relevance of the term "monopsony" in economics? '
    "Please use examples related to potential monopsonies in the labour market and cite relevant research."
    '### Assistant: "Monopsony" refers to a market structure where there is only one buyer for a particular good or '
    "service.\n\nRecent research has identified potential monopsonies in industries such as retail and fast food."
    "### Human: Now explain it to a dog"
}
OASST_TOP1 = {  # OpenAssistant/oasst_top1_2023-08-25
    "text": "<|im_start|>user\nConsigliami 5 nomi per il mio cucciolo di dobermann<|im_end|>\n<|im_start|>assistant\n"
    "Ecco 5 nomi per il tuo cucciolo di dobermann:\n\n- Zeus\n- Apollo\n- Thor\n- Athena\n- Odin<|im_end|>\n"
}
ALPACA = {  # tatsu-lab/alpaca
    "instruction": "Identify the odd one out.",
    "input": "Twitter, Instagram, Telegram",
    "output": "Telegram",
    "text": "Below is an instruction that describes a task, paired with an input that provides further context. ...",
}
SHAREGPT = {  # anon8231489123/ShareGPT_Vicuna_unfiltered
    "id": "QWJhYvA_0",
    "conversations": [
        {
            "from": "human",
            "value": "Summarize the main ideas of Jeff Walker's Product Launch Formula",
        },
        {"from": "gpt", "value": "Here are the main ideas of Jeff Walker's Product Launch Formula:\n\n1. Identify ..."},
        {"from": "human", "value": "Summarize the main ideas of Brendon Burchard's Experts Academy"},
        {"from": "gpt", "value": "1. Focus on an area of expertise: ..."},
    ],
}
ULTRACHAT = {  # HuggingFaceH4/ultrachat_200k
    "prompt": "How can I remove the second image on hover?",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
    "messages": [
        {"content": "How can I remove the second image on hover?", "role": "user"},
        {"content": "Go to your Shopify admin > Online Store > Themes.", "role": "assistant"},
    ],
}
TRL_TEXT = {"prompt": "The sky is", "completion": " blue."}  # TRL, dataset formats: prompt-completion, standard
TRL_TURNS = {  # and conversational
    "prompt": [{"role": "user", "content": "What color is the sky?"}],
    "completion": [{"role": "assistant", "content": "It is blue."}],
}


def test_guanaco() -> None:
    form = form_of(GUANACO)
    assert form.name == "human_text"
    assert [turn[0] for turn in read(GUANACO)] == ["user", "assistant", "user"]
    question, answer, last = (turn[1] for turn in read(GUANACO))
    assert question.startswith("Can you write")
    assert question.endswith("cite relevant research.")
    assert answer.startswith('"Monopsony" refers')
    assert "service.\n\nRecent" in answer
    assert last == "Now explain it to a dog"


@pytest.mark.parametrize("end", ["", "### Human:", "\n### Human: ", "### Human"])
def test_human_text_with_newlines_and_an_open_end(end: str) -> None:
    row = {"text": f"\n### Human: a\nb\n\n### Assistant:\nc\n\n{end}"}
    assert read(row) == [("user", "a\nb", True), ("assistant", "c", True)]


def test_oasst_top1() -> None:
    assert form_of(OASST_TOP1).name == "chatml_text"
    assert read(OASST_TOP1) == [
        ("user", "Consigliami 5 nomi per il mio cucciolo di dobermann", True),
        (
            "assistant",
            "Ecco 5 nomi per il tuo cucciolo di dobermann:\n\n- Zeus\n- Apollo\n- Thor\n- Athena\n- Odin",
            True,
        ),
    ]


def test_alpaca() -> None:
    assert form_of(ALPACA).name == "alpaca"
    assert read(ALPACA) == [
        ("user", "Identify the odd one out.\n\nTwitter, Instagram, Telegram", True),
        ("assistant", "Telegram", True),
    ]
    for empty in ("", None):
        assert read({**ALPACA, "input": empty})[0][1] == "Identify the odd one out."
    del (without := dict(ALPACA))["input"]
    assert read(without)[0][1] == "Identify the odd one out."
    assert read({**ALPACA, "instruction": ""})[0][1] == "Twitter, Instagram, Telegram"


def test_alpaca_with_a_system_prompt_and_earlier_exchanges() -> None:
    # The columns that LLaMA-Factory's Alpaca format adds.
    row = {**ALPACA, "system": "Be brief.", "history": [["Hi", "Hello"], ["And?", ""]]}
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "")]
    assert [turn[:2] for turn in read(row)][:5] == turns
    assert read({**row, "history": json.dumps(row["history"])}) == read(row)
    assert len(read({**row, "history": [], "system": ""})) == 2
    assert fault_of({**row, "history": [["Hi"]]}, form_of(row)) == "`history` is not a list of [question, answer]"


def test_sharegpt() -> None:
    assert form_of(SHAREGPT).name == "sharegpt"
    turns = read(SHAREGPT)
    assert [turn[0] for turn in turns] == ["user", "assistant"] * 2
    assert [turn[1] for turn in turns] == [turn["value"] for turn in SHAREGPT["conversations"]]  # type: ignore[index]
    first = SHAREGPT["conversations"][0]  # type: ignore[index]
    for name in ("gpt", "assistant", "bot", "model", "chatgpt", "bing", "bard"):
        assert read({"conversations": [first, {"from": name, "value": "x"}]})[1][0] == "assistant"


def test_sharegpt_with_a_system_prompt_and_weights() -> None:
    # system: OpenHermes-2.5 and others in a column; weight: OpenHermes 2 and axolotl; loss: mergekit's and others.
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    turns += [{"from": "human", "value": "c", "weight": None}, {"from": "gpt", "value": "d", "loss": 1.0}]
    row = {"conversations": turns, "system": "s"}
    expected = [("system", "s", True), ("user", "a", True), ("assistant", "b", False), ("user", "c", True)]
    assert read(row) == [*expected, ("assistant", "d", True)]
    inside = [{"from": "system", "value": "s"}, *turns]
    assert read({"conversations": inside, "system": "s"}) == read(row)
    differ = {"conversations": inside, "system": "t"}
    assert fault_of(differ, form_of(row)) == "`system` and the system message differ"
    assert fault_of({**row, "system": 5}, form_of(row)) == "`system` is a number, not a string"


def test_ultrachat() -> None:
    assert form_of(ULTRACHAT).name == "messages"
    assert read(ULTRACHAT) == [(m["role"], m["content"], True) for m in ULTRACHAT["messages"]]  # type: ignore[index]


def test_prompt_and_completion_of_text_and_of_turns() -> None:
    assert form_of(TRL_TEXT).name == form_of(TRL_TURNS).name == "prompt_completion"
    assert read(TRL_TEXT) == [("user", "The sky is", False), ("assistant", " blue.", True)]
    assert read(TRL_TURNS) == [("user", "What color is the sky?", False), ("assistant", "It is blue.", True)]
    mixed = {"prompt": [user(), assistant("old"), user("c")], "completion": "new"}
    assert [turn[2] for turn in read(mixed)] == [False, False, False, True]
    assert fault_of({"prompt": 5, "completion": "b"}, form_of(mixed)) == "`prompt` is a number, not a list"
    assert fault_of({"prompt": "a", "completion": None}, form_of(mixed)) == "`completion` is missing"


def spoken(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [turn[:2] for turn in read(row)]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("<s>[INST] a [/INST] b</s>", ["a", "b"]),  # Mistral v1
        (" <s> [INST] a [/INST] b</s> [INST] c [/INST] d", ["a", "b", "c", "d"]),
        ("<s>[INST] a\n[/INST]b </s><s>[INST] c [/INST] d </s>\n", ["a", "b", "c", "d"]),  # Llama 2
        ("<s>[INST] a </s> [/INST] b</s> or </s>x</s>", ["a </s>", "b</s> or </s>x"]),  # typed ones are text
        ("[INST]a[/INST]b</s></s>", ["a", "b</s>"]),
    ],
)
def test_text_of_mistral_and_llama_2(text: str, turns: list[str]) -> None:
    assert form_of({"text": text}).name == "inst_text"
    assert spoken({"text": text}) == [(("user", "assistant")[i % 2], said) for i, said in enumerate(turns)]


@pytest.mark.parametrize(
    "text",
    [
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>",
        "<s>[SYSTEM_PROMPT] s[/SYSTEM_PROMPT][INST] a[/INST] b</s>[INST] c[/INST] d</s>",
    ],
)
def test_text_with_a_system_prompt(text: str) -> None:
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert spoken({"text": text}) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x [INST] a [/INST] b</s>", "`text` is not [INST] ... [/INST] ...</s> from its beginning to its end"),
        ("<s>[INST] a", "`text` is not [INST] ... [/INST] ...</s> from its beginning to its end"),
        (
            "[INST] a [/INST] b [INST] c [/INST] d</s>",
            "[INST] or [/INST] in `text` stands where no turn begins or ends",
        ),
        ("[INST] a [/INST] b [/INST] c</s>", "[INST] or [/INST] in `text` stands where no turn begins or ends"),
        ("[INST] a [INST] b [/INST] c</s>", "[INST] or [/INST] in `text` stands where no turn begins or ends"),
        ("[INST] a [/INST]</s>", "every assistant turn is empty"),
    ],
)
def test_text_that_is_not_of_mistral(text: str, fault: str) -> None:
    assert fault_of({"text": text}, form_of({"text": "[INST] a [/INST] b"})) == fault


@pytest.mark.parametrize(("begin", "end"), [("<s>", "</s>"), ("<|begin_of_text|>", "\n"), ("<s>\n", "<|endoftext|>")])
def test_a_beginning_and_an_end_of_sequence_around_a_text_are_none(begin: str, end: str) -> None:
    for row in (OASST_TOP1, {"text": GUANACO["text"].removesuffix("### Human: Now explain it to a dog")}):
        assert spoken({"text": begin + row["text"].strip() + end}) == spoken(row)
    assert fault_of({"text": OASST_TOP1["text"] + "</s>x"}, form_of(OASST_TOP1)) == (
        "`text` is not ChatML from its beginning to its end"
    )


def test_turns_as_lists_of_roles_and_of_contents() -> None:
    columns = {"role": ["user", "assistant"], "content": ["a", "b"], "weight": [None, 0], "name": None}
    assert read({"messages": columns}) == [("user", "a", True), ("assistant", "b", False)]
    assert spoken({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}) == [
        ("user", "a"),
        ("assistant", "b"),
    ]
    uneven = {"messages": {"role": ["user"], "content": ["a", "b"]}}
    assert fault_of(uneven, MESSAGES) == "`role` and `content` are lists of different lengths"


def test_preferences_and_plain_text_are_refused_by_name() -> None:
    turns = [user(), assistant()]
    text = refusal({"chosen": turns, "rejected": turns, "score": 1})
    assert "training on preferences, which is not done here" in text
    assert "set data.columns: {messages: chosen}" in text
    assert spoken_with({"chosen": turns, "rejected": turns}, messages="chosen") == [("user", "a"), ("assistant", "b")]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert "set data.columns: {completion: chosen}" in refusal(pair)
    assert spoken_with(pair, completion="chosen") == [("user", "a"), ("assistant", "b")]
    assert parse(RawChunk(0, 1, values=[pair]), form_of(pair, columns={"completion": "chosen"})).unseen == {
        "`rejected`": [1]
    }
    text = refusal({"text": "Once upon a time."})
    assert "`text` is plain text, and pretraining on it is not done here" in text
    assert "with what the model should write as the answer" in text


def spoken_with(row: dict[str, Any], **columns: str) -> list[tuple[str, str]]:
    return [turn[:2] for turn in read(row, columns=columns)]


# ---- turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "train"), [(0, False), (1, True), (False, False), (1.0, True), (None, True)])
def test_a_turn_that_is_not_to_be_trained_on(flag: Any, train: bool) -> None:
    for key in ("train", "training", "train_on_turn", "trainable", "weight", "loss", "loss_mask", "step_loss_mask"):
        assert read({"messages": [user(), assistant(**{key: flag})]})[1][2] is train
    if flag is not None:
        assert read({"messages": [user(), assistant(masked=flag)]})[1][2] is not train


def test_flags_that_disagree_are_refused() -> None:
    assert fault_of({"messages": [user(), assistant(weight=0, train=True)]}, MESSAGES) == (
        "`weight` and `train` of a turn disagree"
    )
    assert read({"messages": [user(), assistant(weight=0, masked=True)]})[1][2] is False
    assert read({"messages": [user(), assistant(weight=0, mask=1)]}, columns={"train": "mask"})[1][2] is True


def test_what_no_form_reads_is_named() -> None:
    thinking = {"draft": "Hm.", "tool_calls": None, "thinking": "", "id": 0}
    rows = [
        {"messages": [user(mask=1), assistant(**thinking)], "functions": [{}], "images": [], "id": 5},
        {**ULTRACHAT, "system": "Be brief."},
        {"messages": [user(), assistant()], "prompt": None},
    ]
    parsed = parse(RawChunk(0, 1, values=rows), MESSAGES)
    assert parsed.unseen == {
        "`id`": [1],
        "`functions`": [1],
        "`mask` of turns": [1],
        "`draft` of turns": [1],
        "`id` of turns": [1],
        "`prompt_id`": [2],  # and not its `prompt`, which is the first question
        "`system`": [2],
    }
    assert {name for name in parsed.unseen if matters(name)} == {
        "`functions`",
        "`mask` of turns",
        "`system`",
    }
    assert "set data.columns.train: mask" in advice("`mask` of turns")
    assert (
        danger("`mask` of turns") == danger("`mask`") == "nobody reads it, so what it marks is trained on all the same"
    )
    assert danger("`draft` of turns") == "the model never sees it"
    assert "set data.columns.system: system" in advice("`system`")


def test_content_in_parts_is_joined_as_mistral_common_joins_it() -> None:
    # mistral_common.protocol.instruct.normalize joins the text chunks of a message by "\n\n".
    parts = [{"type": "text", "text": text, "image_url": None} for text in ("a", "", "b")]
    assert read({"messages": [user(parts), assistant()]})[0][1] == "a\n\nb"


@pytest.mark.parametrize(
    ("first", "second"), [("User", "Assistant"), ("Human", "GPT"), ("human", "gpt"), ("USER ", "Model")]
)
def test_usual_names_of_the_speakers_are_known_in_every_form(first: str, second: str) -> None:
    expected = [("system", "s", True), ("user", "a", True), ("assistant", "b", True)]
    said = [("developer", "s"), (first, "a"), (second, "b")]
    assert read({"messages": [{"role": role, "content": text} for role, text in said]}) == expected
    assert read({"conversations": [{"from": role, "value": text} for role, text in said]}) == expected
    assert read({"text": "".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in said)}) == expected
    # What the recipe says comes first.
    swapped = read({"messages": [{"role": "gpt", "content": "a"}, assistant()]}, roles={"gpt": "user"})
    assert swapped[0] == ("user", "a", True)


def test_a_column_that_holds_json_text() -> None:
    assert read({"messages": json.dumps([user(), assistant()])}) == [("user", "a", True), ("assistant", "b", True)]
    assert form_of({"conversations": json.dumps(SHAREGPT["conversations"])}).name == "sharegpt"


def test_control_characters_empty_turns_and_a_last_question_are_kept() -> None:
    turns = [user(""), assistant(""), user("\x00\x1b[31m\u202e"), assistant("x"), user("?")]
    assert [turn[1] for turn in read({"messages": turns})] == ["", "", "\x00\x1b[31m\u202e", "x", "?"]


def test_the_columns_of_arrow_tables_hold_nulls() -> None:
    extra = {"name": None, "tool_calls": None, "weight": None, "train": None}
    assert read({"messages": [user(**extra), assistant(**extra)]}) == [("user", "a", True), ("assistant", "b", True)]


# ---- names of the user's own ----------------------------------------------------------------------------------------


def test_columns_of_other_names() -> None:
    dolly = {"instruction": "When did it begin?", "context": "In 2000.", "response": "2000", "category": "closed_qa"}
    turns = [("user", "When did it begin?\n\nIn 2000.", True), ("assistant", "2000", True)]
    assert read(dolly, columns={"input": "context", "output": "response"}) == turns
    own = {"dialog": [{"who": "Q", "says": "a", "learn": 1}, {"who": "A", "says": "b", "learn": 0}]}
    columns = {"messages": "dialog", "role": "who", "content": "says", "train": "learn"}
    roles = {"Q": "user", "A": "assistant"}
    assert read(own, "messages", columns=columns, roles=roles) == [("user", "a", True), ("assistant", "b", False)]
    assert read(own, columns=columns, roles=roles) == [("user", "a", True), ("assistant", "b", False)]
    asked = {"question": "a", "answer": "b", "note": "s"}
    columns = {"prompt": "question", "completion": "answer", "system": "note"}
    assert [turn[:2] for turn in read(asked, columns=columns)] == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_usual_names_of_the_list() -> None:
    turns = [user(), assistant()]
    for name in ("messages", "conversations", "conversation"):
        assert form_of({name: turns}).columns["messages"] == name
    assert (
        form_of({"messages": None, "conversations": SHAREGPT["conversations"]}).columns["messages"] == "conversations"
    )
    assert form_of({"messages": None}).name == "messages"


@pytest.mark.parametrize(
    ("row", "used"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),  # GSM8K
        ({"Question": "a", "Answer": "b"}, {"prompt": "Question", "completion": "Answer"}),
        ({"query": "a", "response": "b", "type": "x"}, {"prompt": "query", "completion": "response"}),  # MetaMathQA
        ({"input": "a", "output": "b"}, {"prompt": "input", "completion": "output"}),
        ({"inputs": "a", "targets": "b", "task": "x"}, {"prompt": "inputs", "completion": "targets"}),  # FLAN
        ({"problem": "a", "solution": "b"}, {"prompt": "problem", "completion": "solution"}),
        ({"prompt": "a", "response": "b"}, {"prompt": "prompt", "completion": "response"}),
        ({"instruction": "a", "response": "b"}, {"prompt": "instruction", "completion": "response"}),
        ({"user": "a", "assistant": "b"}, {"prompt": "user", "completion": "assistant"}),
        ({"text": "prose", "question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
    ],
)
def test_a_question_and_an_answer_under_names_in_use(row: dict[str, str], used: dict[str, str]) -> None:
    form = form_of(row)
    assert form.name == "prompt_completion"
    assert used.items() <= form.columns.items()
    assert read(row) == [("user", "a", False), ("assistant", "b", True)]


def test_what_a_question_refers_to_and_its_system_prompt() -> None:
    dolly = {"instruction": "When?", "context": "In 2000.", "response": "2000", "category": "closed_qa"}
    assert read(dolly) == [("user", "When?\n\nIn 2000.", True), ("assistant", "2000", True)]
    sql = {"question": "How many?", "context": "CREATE TABLE a", "answer": "SELECT 1"}
    assert read(sql)[0][1] == "How many?\n\nCREATE TABLE a"
    orca = {"id": "1", "system_prompt": "Be brief.", "question": "a", "response": "b"}
    assert [turn[:2] for turn in read(orca)] == [("system", "Be brief."), ("user", "a"), ("assistant", "b")]


def test_names_in_use_beside_what_the_recipe_says() -> None:
    row = {"Frage": "a", "answer": "b"}
    assert form_of(row, columns={"prompt": "Frage"}).columns["completion"] == "answer"
    assert form_of(row, columns={"instruction": "Frage"}).columns["output"] == "answer"
    for form in ("prompt_completion", "alpaca"):
        assert form_of({"question": "a", "answer": "b"}, form).name == form


def test_two_columns_that_could_be_the_answer() -> None:
    text = refusal({"question": "a", "answer": "b", "response": "c"})
    assert "`answer` and `response` could each be the answer" in text
    assert "set data.columns: {prompt: question, completion: answer}" in text


@pytest.mark.parametrize(
    ("columns", "row", "right"),
    [
        ({"question": "prompt", "answer": "completion"}, {"question": "a", "answer": "b"}, None),
        ({"input": "prompt", "output": "completion"}, {"input": "a", "output": "b"}, None),
        ({"dialog": "messages", "who": "role"}, {"dialog": [{"who": "user", "content": "a"}]}, None),
        (
            {"prompt": "question", "reply text": "completion"},
            {"question": "a", "reply text": "b"},
            '{prompt: question, completion: "reply text"}',
        ),
    ],
)
def test_columns_written_the_other_way_round(columns: dict[str, str], row: dict[str, Any], right: str | None) -> None:
    text = refusal(row, columns=columns)
    assert "data.columns is written the other way round: our name comes first" in text
    right = right or f"{{{', '.join(f'{ours}: {own}' for own, ours in columns.items())}}}"
    assert f"fix: write data.columns: {right}" in text


def test_roles_written_the_other_way_round() -> None:
    text = refusal({"messages": [{"role": "customer"}]}, roles={"user": "customer", "assistant": "agent"})
    assert "data.roles is written the other way round: the role in your data comes first, then ours" in text
    assert "fix: write data.roles: {customer: user, agent: assistant}" in text


def test_the_line_for_columns_is_made_of_the_names_that_are_there() -> None:
    assert "question and answer: data.columns: {prompt: foo, completion: bar}" in refusal({"foo": "a", "bar": "b"})
    assert "data.columns: {prompt: question, completion: b}" in refusal({"b": "a", "question": "b"})
    text = refusal({"question": "a", "answer": "b"}, columns={"prompt": "quest", "completion": "answer"})
    assert "did you mean `question`? write data.columns: {prompt: question, completion: answer}" in text
    text = refusal({"question": "a", "answer": "b"}, columns={"zzz": "question"})
    assert "fix: write data.columns: {prompt: question, completion: answer}" in text


def refusal(row: dict[str, Any], wanted: Any = "auto", **maps: dict[str, str]) -> str:
    with pytest.raises(DataError) as caught:
        form_of(row, wanted, **maps)
    return str(caught.value)


def test_no_column_holds_conversations() -> None:
    text = refusal({"question": "a", "text": "just prose"})
    assert "no column holds conversations; the columns are: question, text" in text
    for part in ("`messages`", "`conversations`", "`prompt`", "`instruction`", "### Human:", "<|im_start|>"):
        assert part in text
    assert "name your columns in data.columns" in text
    assert "the columns are: none" in refusal({})


def test_the_column_of_the_wanted_form_is_not_there() -> None:
    text = refusal({"messages": []}, "chatml_text")
    assert "data.format chatml_text needs a column `text`; the columns are: messages" in text
    text = refusal({"instruction": "a", "outputs": "b"}, "alpaca")
    assert "needs a column `output`" in text
    assert "did you mean `outputs`? Set data.columns: {output: outputs}" in text
    text = refusal({"messages": [user()], "system_prompt": "s"}, columns={"system": "sytem_prompt"})
    assert "needs a column `sytem_prompt`" in text
    assert "did you mean `system_prompt`? write data.columns: {system: system_prompt}" in text


def test_names_that_mean_nothing() -> None:
    text = refusal({"messages": []}, columns={"mesages": "messages"})
    assert "our name of a column comes first, then yours, and 'mesages' is no name of ours" in text
    assert "write data.columns: {messages: messages}" in text
    text = refusal({"messages": []}, roles={"bot": "asistant"})
    assert "data.roles says what each role in your data is here, and 'asistant' is no role of ours" in text
    assert "allowed: system, user, assistant" in text
    assert "write data.roles: {bot: assistant}" in text
    text = refusal({"messages": []}, columns={"prompt": "messages"})
    assert "data.columns.prompt means nothing in the form messages" in text
    assert "allowed: messages, role, content, tools, train, system" in text


# ---- what cannot be trained on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([user(), assistant(None)], "the content of a turn is null, not a string"),
        ([user({"text": "a"}), assistant()], "the content of a turn is a mapping, not a string"),
        ([user(7), assistant()], "the content of a turn is a number, not a string"),
        ([user(True), assistant()], "the content of a turn is a truth value, not a string"),
        ([user(["a"]), assistant()], "the content of a turn is a list with a string in it, not a string or text parts"),
        (
            [user([{"type": "image_url", "image_url": {}}]), assistant()],
            "the content of a turn has a part of type 'image_url'; only text is taken",
        ),
        ([user("\ud800"), assistant()], "the content of a turn is not valid Unicode (a lone surrogate)"),
        ([user()], "no assistant turn, so nothing to learn"),
        ([user(), assistant(" \n"), user(), assistant("")], "every assistant turn is empty"),
        ([assistant()], "the assistant speaks first"),
        ([{"role": "system", "content": "s"}, assistant()], "the assistant speaks first"),
        ([user(), user(), assistant()], "two user turns in a row"),
        ([user(), assistant(), assistant()], "two assistant turns in a row"),
        ([user(), {"role": "system", "content": "s"}, assistant()], "a system message that is not the first turn"),
        ([{"role": "system", "content": "s"}] * 2, "a system message that is not the first turn"),
        ([{"role": "user"}, assistant()], "a turn is not a mapping with `role` and `content`"),
        (["a", "b"], "a turn is not a mapping with `role` and `content`"),
        (
            [{"role": "Der Kritiker", "content": "a"}, assistant()],
            "role 'Der Kritiker' is unknown; if it is the user's, set data.roles: {\"Der Kritiker\": user}",
        ),
        ([{"role": "x" * 999, "content": "a"}], f"role '{'x' * 40}...' is unknown"),
        ([{"role": ["user"], "content": "a"}, assistant()], "a role is a list, not a string"),
        ([user(), assistant(train=0.5)], "a turn's `train` is neither 0 nor 1"),
        ([user(), assistant(weight="1")], "a turn's `weight` is neither 0 nor 1"),
        ([user(), {"role": "tool", "content": "5"}], "a tool answers where nothing called it"),
        ([user(), assistant(None, tool_calls=[{}])], "a tool call does not name a function"),
        (
            [user(), {"role": "assistant", "tool_calls": 5}],
            "the tool calls of a turn are a number, not a list of calls",
        ),
        (
            [user(), assistant(tool_calls=[call("f", "{")])],
            "the arguments of a tool call are a string that is not JSON",
        ),
        (
            [user(), assistant(tool_calls=[call("f", '{"a":' * 100_000)])],
            "the arguments of a tool call are JSON that is nested too deeply",
        ),
        (
            [user(), assistant(tool_calls=[call("f", '{"a": ' + "1" * 5_000 + "}")])],
            "the arguments of a tool call are JSON with a number of more than 4,300 digits",
        ),
        (
            [user(), assistant(tool_calls=[call("f", "5")])],
            "the arguments of a tool call are a number, not a JSON object",
        ),
        ([user(tool_calls=[call("f")]), assistant()], "a turn of role 'user' calls tools"),
        ([user(), assistant(function_call={"name": "f"})], FUNCTION_CALL),
        ([user(), assistant(reasoning_content=5)], "`reasoning_content` of a turn is a number, not a string"),
        ([], "`messages` is empty"),
        (None, "`messages` is missing"),
        ("hello", "`messages` is a string that is not JSON"),
        ("[" * 100_000, "`messages` is JSON that is nested too deeply"),
        ('"hello"', "`messages` is a string, not a list"),
        (3, "`messages` is a number, not a list"),
    ],
)
def test_a_conversation_that_teaches_nothing_sound(messages: Any, fault: str) -> None:
    assert fault_of({"messages": messages}, MESSAGES) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("plain <|im_start|>user\na<|im_end|>", "`text` is not ChatML from its beginning to its end"),
        (OASST_TOP1["text"] + "<|im_start|>user\nunfinished", "`text` is not ChatML from its beginning to its end"),
        ("<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>", "a turn of `text` has no <|im_end|>"),
        (
            "<|im_start|>critic\na<|im_end|><|im_start|>assistant\nb<|im_end|>",
            "role 'critic' is unknown; if it is the user's, set data.roles: {critic: user}",
        ),
        (5, "`text` is a number, not a string"),
        (None, "`text` is missing"),
    ],
)
def test_text_that_is_not_chatml(text: Any, fault: str) -> None:
    assert fault_of({"text": text}, form_of(OASST_TOP1)) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A chat. ### Human: a### Assistant: b", "`text` does not begin with `### Human:`"),
        ("plain", "`text` does not begin with `### Human:`"),
        ("</s>### Human: a### Assistant: b", "`text` does not begin with `### Human:`"),
        ("### Human: a### Human: b### Assistant: c", "two user turns in a row"),
        ("### Human: a### Assistant:", "every assistant turn is empty"),
        (["a"], "`text` is a list, not a string"),
    ],
)
def test_text_that_is_not_of_human_and_assistant(text: Any, fault: str) -> None:
    assert fault_of({"text": text}, form_of(GUANACO)) == fault


def test_a_row_that_is_no_mapping() -> None:
    assert fault_of(["a"], MESSAGES) == "the row is a list, not a mapping"


# ---- a chunk --------------------------------------------------------------------------------------------------------


def test_parse_keeps_positions_and_reasons() -> None:
    good: list[Message] = [
        {"role": "user", "content": "a", "train": True},
        {"role": "assistant", "content": "b", "train": True},
    ]
    row = json.dumps({"messages": [user(), assistant()]}).encode()
    cut, tail = row[:-5], b'{"messages": [}'
    lines = [row, b"", cut, b"[1, 2]", b'{"text": "\xff"}', row, b"7", b"[" * 200_000, tail, b"1" * 9999, b'{"a": "b']
    parsed = parse(RawChunk(3, 11, lines=lines), MESSAGES)
    assert parsed.conversations == [good, good]
    assert parsed.positions == [11, 16]
    assert parsed.refused == [
        (13, "not valid JSON: it ends in the middle of a value"),
        (14, "valid JSON, but not an object"),
        (15, "not UTF-8"),
        (17, "valid JSON, but not an object"),
        (18, "not valid JSON: nested too deeply"),
        (19, "not valid JSON: Expecting value"),
        (20, "not valid JSON: a number has too many digits"),
        (21, "not valid JSON: it ends in the middle of a value"),
    ]


def test_parse_of_values() -> None:
    values = [{"messages": [user(), assistant()]}, RowFault("not UTF-8"), "text", {"messages": [user()]}]
    parsed = parse(RawChunk(0, 1, values=values), MESSAGES)
    assert parsed.positions == [1]
    assert parsed.refused == [
        (2, "not UTF-8"),
        (3, "valid JSON, but not an object"),
        (4, "no assistant turn, so nothing to learn"),
    ]


def test_columns_that_nobody_reads_are_named_in_the_order_of_the_row() -> None:
    names = [f"column{number}" for number in range(20)]
    row = {"messages": [], **dict.fromkeys(names, "x")}
    assert list(unread_columns(row, MESSAGES)) == names
