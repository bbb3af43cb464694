"""The commands of the terminal: what they change, and what they say to a mistake, after which the talk goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.forms import to_conversation
from finetune.data.reading import rows_of, sample_row
from finetune.data.recognition import find_form
from finetune.data.sources import Source, open_source
from finetune.infer.request import Sampling
from tests.chat.conftest import Talk


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sett temperature=1", ("there is no command /sett", "did you mean /set?", "/help")),
        ("/", ("there is no command /", "/reset")),
        ("/model other", ("there is no model 'other'", "tuned, base", "--adapter")),
        ("/set temperature", ("'temperature' sets nothing", "NAME=VALUE")),
        ("/set temprature=1", ("there is no setting 'temprature'", "max_new_tokens, temperature", "did you mean")),
        ("/set ignore_eos=1", ("there is no setting 'ignore_eos'", "choose one of them")),
        ("/set top_k=1.5", ("top_k is '1.5'", "a whole number", "top_k=0")),
        ("/set temperature=warm", ("temperature is 'warm'", "a number")),
        ("/set temperature=nan", ("temperature is nan", "0 to 100")),
        ("/set top_p=2", ("top_p is 2.0", "above 0, at most 1")),
        ("/retry", ("nothing has been asked yet", "ask something first")),
        ("/save", ("no file name was given", "/save FILE")),
        ("/save /tmp", ("nothing has been said yet", "ask something first")),
        ("/load", ("no file name was given", "/load FILE")),
        ("/load /nowhere.jsonl", ("there is no such file", "/nowhere.jsonl", "/save wrote")),
    ],
)
def test_a_mistake_is_said_and_changes_nothing(talk: Talk, line: str, says: tuple[str, ...]) -> None:
    out, err = talk.say(line, "Hi")
    assert out == "tuned: Hi\n"
    for words in ("error: ", *says):
        assert words in err
    assert talk.session.sampling == Sampling()


def test_leaving_ends_the_talk(talk: Talk) -> None:
    assert talk.say("one", "/exit", "never asked")[0] == "tuned: one\n"


def test_settings_are_taken_together_or_not_at_all(talk: Talk) -> None:
    talk.say("/set temperature=0.7 top_k=5", "/set seed=3 top_p=9")
    assert talk.session.sampling == Sampling(temperature=0.7, top_k=5)
    _, err = talk.say("/set")
    assert err == "max_new_tokens=128 temperature=0.7 top_p=1.0 top_k=5 min_p=0.0 repetition_penalty=1.0 seed=0"


def test_help_names_every_command(talk: Talk) -> None:
    _, err = talk.say("/help")
    _, refused = talk.say("/none")
    allowed = refused.split("allowed: ")[1].splitlines()[0].split(", ")
    assert len(allowed) == 10
    assert [name for name in allowed if name not in err] == []


def test_the_conversation_and_the_system_message_reach_the_model(talk: Talk) -> None:
    seen = []
    encode = talk.engine.encode_chat
    talk.engine.encode_chat = lambda messages, model=None: (seen.append(list(messages)), encode(messages))[1]  # type: ignore[method-assign]
    talk.say("/system Be brief.", "one", "/model base", "two")
    system = {"role": "system", "content": "Be brief."}
    one = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "tuned: one"}]
    two = {"role": "user", "content": "two"}
    assert seen[1:] == [[system, one[0]], [system, *one, two]]
    assert [request.model for request in talk.engine.requests] == ["tuned", "base"]
    seen.clear()
    talk.say("/reset", "three", "/system", "/reset", "four")
    assert [len(messages) for messages in seen if messages[0]["role"] == "system"] == [2]
    assert seen[-1] == [{"role": "user", "content": "four"}]


def test_a_template_without_system_messages_leaves_things_as_they_are(talk: Talk) -> None:
    talk.engine.refuses_system = True
    out, err = talk.say("/system Be brief.", "Hi")
    assert "no system message here" in err
    assert out == "tuned: Hi\n"


def test_retry_asks_again_by_another_seed_and_keeps_one_answer(talk: Talk) -> None:
    out, _ = talk.say("/set temperature=1 seed=7", "one", "two", "/model base", "/retry", "/retry")
    assert out == "tuned: one\ntuned: two\nbase: two\nbase: two\n"
    assert [request.sampling.seed for request in talk.engine.requests] == [7, 7, 8, 9]
    assert talk.session.conversation.turns == [("one", "tuned: one"), ("two", "base: two")]
    lengths = [len(request.ids) for request in talk.engine.requests]
    assert lengths[1:] == [lengths[1]] * 3


def test_a_conversation_that_no_longer_fits_is_left_as_it_was(talk: Talk) -> None:
    talk.engine.max_length = 12
    out, err = talk.say("one", "two", "three four five six", "/reset", "seven")
    assert out == "tuned: one\ntuned: two\ntuned: seven\n"
    assert "the conversation no longer fits: with this question it has 15 tokens" in err
    assert "fewer than 12" in err
    assert "/reset" in err
    assert talk.session.conversation.turns == [("seven", "tuned: seven")]


def test_an_answer_that_is_cut_says_why(talk: Talk) -> None:
    talk.engine.max_length = 7
    _, err = talk.say("/set max_new_tokens=2", "one two three", "/reset", "/set max_new_tokens=20", "one two three")
    assert "2 tokens" in err
    assert "cut at max_new_tokens=2" in err
    assert "the model's maximum of 7 tokens is reached: /reset starts over" in err


def test_an_empty_answer_is_not_kept(talk: Talk) -> None:
    talk.engine.silent = True
    out, err = talk.say("one")
    assert out == ""
    assert err.startswith("0 tokens, the model said nothing, so the question is not kept")
    assert talk.session.conversation.turns == []
    talk.engine.silent = False
    out, _ = talk.say("/retry")
    assert talk.session.conversation.turns == [("one", "tuned: one")]


def test_what_is_saved_is_training_data_and_can_be_continued(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "said.jsonl"
    hard = 'Größe "x" \u2028 \U0001f600 </s>'
    talk.say("/system Be brief.", hard, "two", f"/save {path}")
    reader = open_source(Source(str(path)))
    chunk, _ = next(reader.chunks(0))
    [(_, row)] = list(rows_of(chunk))
    form = find_form(sample_row(reader), "auto", columns={}, roles={}, where="test")
    assert form.name == "messages"
    assert [(m["role"], m["content"]) for m in to_conversation(row, form)] == [
        ("system", "Be brief."),
        ("user", hard),
        ("assistant", f"tuned: {' '.join(hard.split())}"),
        ("user", "two"),
        ("assistant", "tuned: two"),
    ]
    before = talk.session.conversation
    out, err = talk.say("/system", "/reset", f"/load {path}", "/retry")
    assert talk.session.conversation == before
    assert out.splitlines()[-1] == "tuned: two"
    assert "> two" in err


def test_what_was_said_after_saving_is_unsaved(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    unsaved = []
    for line in ("/system Be brief.", "one", f"/save {path}", "two", f"/load {path}", "/system", "/reset"):
        talk.say(line)
        unsaved.append(talk.session.is_unsaved)
    assert unsaved == [False, True, False, True, False, True, False]


def test_save_never_replaces_a_file_unasked(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text("mine\n")
    _, err = talk.say("one", f"/save {path}")
    assert "the file exists already" in err
    assert "/save! FILE" in err
    assert path.read_text() == "mine\n"
    talk.say(f"/save! {path}")
    assert '"tuned: one"' in path.read_text(encoding="utf-8")
    _, err = talk.say(f"/save {tmp_path}", f"/save {path}/below")
    assert "it is a folder" in err
    assert "the file cannot be written" in err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}', ("no assistant turn", "said.jsonl line 1")),
        ('{\n{"messages": []}', ("not valid JSON", "line 1")),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
            '{"role": "user", "content": "c"}]}',
            ("its roles are user, assistant, user", "the assistant last"),
        ),
        ('{"other": 1}', ("no column holds conversations",)),
    ],
)
def test_a_file_that_cannot_be_continued(talk: Talk, tmp_path: Path, row: str, says: tuple[str, ...]) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text(row + "\n")
    out, err = talk.say("one", f"/load {path}", "two")
    assert out == "tuned: one\ntuned: two\n"
    for words in ("error: ", *says):
        assert words in err
