"""Which turns are supervised: by hand, and by the tokens that come out."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data.chat import apply_template
from finetune.data.encoding import ChatEncoder, Refused, encode_settings, encoder_of, supervised_turns
from finetune.data.rows import LossOn
from tests.data.conftest import MODEL


def turns(text: str) -> list[dict[str, Any]]:
    """`s`, `u` or `a` for each turn, in capitals where the row says `train: false`."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [
        {"role": roles[char.lower()], "content": f"{char}{number}", "train": char.islower()}
        for number, char in enumerate(text)
    ]


@pytest.mark.parametrize(
    ("text", "every", "last", "completion"),
    [
        ("ua", "1", "1", "1"),
        ("suaua", "11", "01", "01"),
        ("uAua", "01", "01", "01"),
        ("uaUa", "11", "01", "01"),
        ("UAUaua", "011", "001", "011"),  # a prompt of three turns, a completion of three
        ("Uaua", "11", "01", "11"),
        ("uauA", "10", "00", "00"),
        ("SUa", "1", "1", "1"),
        ("u", "", "", ""),
    ],
)
def test_turns(text: str, every: str, last: str, completion: str) -> None:
    expected: dict[LossOn, str] = {"all": every, "last": last, "completion": completion}
    for loss_on, marks in expected.items():
        assert "".join(str(int(mark)) for mark in supervised_turns(turns(text), loss_on)) == marks


@pytest.mark.parametrize("loss_on", ["all", "last", "completion"])
def test_the_tokens_of_a_turn_are_supervised_with_its_end(tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    for text in ("ua", "suaua", "uAua", "UAUaua", "uauA", "suAuaUa"):
        messages = turns(text)
        [row] = encoder_of(tokenizer).encode([messages], loss_on=loss_on)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        marks = supervised_turns(messages, loss_on)
        wanted = [f"{text}</s>" for text, mark in zip(said, marks, strict=True) if mark]
        supervised = tokenizer.decode(row.ids[row.supervised]) if row.supervised.any() else ""
        assert supervised.replace("</s> ", "</s>") == "".join(wanted)


def test_without_train_every_turn_is_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns("suaua")
    bare = [{"role": m["role"], "content": m["content"]} for m in messages]
    [row], [same] = (encoder_of(tokenizer).encode([m]) for m in (messages, bare))
    assert row.ids.tolist() == same.ids.tolist()
    assert row.supervised.tolist() == same.supervised.tolist()
    assert row.ids.dtype == "int32"
    assert row.supervised.dtype == bool


def test_a_template_that_marks_otherwise_than_by_turn_is_refused_where_turns_are_chosen(
    own_tokenizer: PreTrainedTokenizerBase,
) -> None:
    own_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}{%- generation -%}"
        "{{ m['content'] }}{%- endgeneration -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}{% endif %}"
        "{% endfor %}"
    )
    apply_template(own_tokenizer, "model")
    encoder = encoder_of(own_tokenizer)
    [row] = encoder.encode([turns("uaua")])
    assert row.supervised.any()
    fine, refused = encoder.encode_each([turns("ua"), turns("uaua")], loss_on="last")
    assert not isinstance(fine, Refused)
    assert isinstance(refused, Refused)
    assert str(refused) == (
        "the chat template marks 4 stretches of a conversation with 2 assistant turns, so it cannot be told which of "
        "them to learn"
    )
    assert refused.position == 1
    again = pickle.loads(pickle.dumps(refused))
    assert (again.position, str(again)) == (refused.position, str(refused))
    assert "where: row 2" in str(refused.error("row 2"))


def test_refused_conversations_leave_the_others_in_place(tokenizer: PreTrainedTokenizerBase) -> None:
    conversations = [turns("ua"), turns("au"), turns("uaua"), turns("s")]
    first, second, third, fourth = encoder_of(tokenizer).encode_each(conversations)
    assert isinstance(second, Refused)
    assert isinstance(fourth, Refused)
    assert "message 1 has role assistant" in str(second)
    assert str(fourth) == "the chat template does not write message 1"
    [alone], [also] = (encoder_of(tokenizer).encode([c]) for c in (conversations[0], conversations[2]))
    assert not isinstance(first, Refused)
    assert not isinstance(third, Refused)
    assert (first.ids.tolist(), third.ids.tolist()) == (alone.ids.tolist(), also.ids.tolist())


def test_an_encoder_can_be_sent(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ChatEncoder(tokenizer)
    [row] = encoder.encode([turns("suaua")])
    [same] = pickle.loads(pickle.dumps(encoder)).encode([turns("suaua")])
    assert row.ids.tolist() == same.ids.tolist()
    assert row.supervised.tolist() == same.supervised.tolist()


@pytest.mark.slow
def test_settings_are_the_same_in_another_process_and_change_with_what_matters(
    own_tokenizer: PreTrainedTokenizerBase,
) -> None:
    digest = encode_settings(own_tokenizer)
    program = (
        "from transformers import AutoTokenizer; from finetune.data.encoding import encode_settings; "
        f"print(encode_settings(AutoTokenizer.from_pretrained({str(MODEL)!r})))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest
    own_tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert encode_settings(own_tokenizer) == digest
    seen = {digest}
    own_tokenizer.chat_template += " "
    seen.add(encode_settings(own_tokenizer))
    own_tokenizer.eos_token = "<unk>"
    seen.add(encode_settings(own_tokenizer))
    own_tokenizer.add_tokens(["<new>"])
    seen.add(encode_settings(own_tokenizer))
    assert len(seen) == 4
