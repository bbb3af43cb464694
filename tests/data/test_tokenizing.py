"""Word by word against the tokenizer itself, which encodes the conversation in one piece."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.data.rendering import MISTRAL_V1, Rendered, Renderer
from finetune.data.rows import Encoded
from finetune.data.tokenizing import AliasedTokenizer, WordTokenizer
from tests.data.conftest import MODEL

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
DEFINITION = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer.to_str()
WORDS = WordTokenizer.make(DEFINITION, SPECIAL)
WHOLE = AliasedTokenizer(DEFINITION, SPECIAL, "<unk>")
RENDERER = Renderer(MISTRAL_V1, {"bos_token": "<s>", "eos_token": "</s>"}, SPECIAL)
TEXT = st.text(st.sampled_from("ab  \n\t▁<>/s[INST]é你🙂\U000f0000\x00"), max_size=20) | st.text(max_size=12)


def differences(rows: list[Rendered]) -> list[Rendered]:
    """Rows that are not done, or not as the whole tokenizer does them."""
    assert WORDS is not None
    wrong = []
    for row, ours, truth in zip(rows, WORDS.encode(rows), WHOLE.encode(rows), strict=True):
        assert isinstance(truth, Encoded)
        if ours is None or ours.ids.tolist() != truth.ids.tolist() or any(ours.supervised != truth.supervised):
            wrong.append(row)
    return wrong


def test_conversations(reference_conversations: list[dict[str, Any]]) -> None:
    assert not differences([RENDERER.render(row["messages"]) for row in reference_conversations])


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.booleans())
def test_any_text(exchanges: list[tuple[str, str]], prompt: bool) -> None:
    messages = [
        {"role": role, "content": t} for e in exchanges for role, t in zip(("user", "assistant"), e, strict=True)
    ]
    messages = messages[:-1] if prompt else messages
    assert not differences([RENDERER.render(messages, add_generation_prompt=prompt)])


@settings(max_examples=1000, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=5), st.data())
def test_any_spans(texts: list[str], data: st.DataObject) -> None:
    """A span that begins or ends inside a word is left to the other way; the others agree with it."""
    assert WORDS is not None
    pieces = [part for text in texts for part in (text, "</s>")][:-1]
    length = sum(map(len, pieces))
    start = data.draw(st.integers(0, length))
    row = Rendered(pieces, [(start, data.draw(st.integers(start, length)))])
    [ours] = WORDS.encode([row])
    [truth] = WHOLE.encode([row])
    assert isinstance(truth, Encoded)
    if ours is not None:
        assert ours.ids.tolist() == truth.ids.tolist()
        assert ours.supervised.tolist() == truth.supervised.tolist()


def test_a_span_has_every_byte_of_its_last_character() -> None:
    for text in ("🙂", "a\U000f0000", "x 🙂🙂"):
        row = Rendered([text, "</s>", "b"], [(0, len(text))])
        [truth] = WHOLE.encode([row])
        assert isinstance(truth, Encoded)
        assert truth.supervised.tolist() == (np.arange(len(truth.ids)) < truth.ids.tolist().index(2)).tolist()
        assert not differences([row])


def test_what_is_kept_is_let_go(monkeypatch: pytest.MonkeyPatch, reference_conversations: list[dict[str, Any]]) -> None:
    monkeypatch.setattr("finetune.data.tokenizing._KEPT_BYTES", 10_000)
    rows = [RENDERER.render(row["messages"]) for row in reference_conversations]
    assert not any(differences(rows[at : at + 10]) for at in range(0, len(rows), 10))


def test_the_v3_tokenizer_is_fit(tokenizer_v3: PreTrainedTokenizerFast) -> None:
    special = {token.content: i for i, token in tokenizer_v3.added_tokens_decoder.items()}
    assert WordTokenizer.make(tokenizer_v3.backend_tokenizer.to_str(), special) is not None


@pytest.mark.parametrize(
    "fault",
    ["normalizer", "pre_tokenizer", "dropout", "piece across words", "byte", "added", "stripping", "merged", "spaced"],
)
def test_any_other_tokenizer_is_not(tokenizer: PreTrainedTokenizerBase, fault: str) -> None:
    parts = json.loads(DEFINITION)
    special = dict(SPECIAL)
    if fault == "normalizer":
        parts["normalizer"]["normalizers"].reverse()
    elif fault == "pre_tokenizer":
        parts["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    elif fault == "dropout":
        parts["model"]["dropout"] = 0.1
    elif fault == "piece across words":
        parts["model"]["vocab"]["a▁b"] = 32000
    elif fault == "byte":
        parts["model"]["vocab"]["no byte"] = parts["model"]["vocab"].pop("<0x41>")
    elif fault == "added":
        parts["added_tokens"].append({**parts["added_tokens"][0], "content": "<think>", "special": False})
    elif fault == "stripping":
        parts["added_tokens"][1]["rstrip"] = True
    elif fault == "merged":
        parts["model"]["merges"].append(["</", "s>"])
    elif fault == "spaced":
        parts["added_tokens"][1]["content"] = "▁"
        special = {"<unk>": 0, "▁": 1, "</s>": 2}
    assert WordTokenizer.make(json.dumps(parts), special) is None


def test_two_threads_that_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server encodes on two threads; the words that one keeps are not lost to the other."""
    assert WORDS is not None
    monkeypatch.setattr("finetune.data.tokenizing._KEPT_BYTES", 0)
    texts = [" ".join(f"word{number * 7 + place}" for place in range(300)) for number in range(40)]
    rows = [Rendered([text], []) for text in texts]
    alone = [encoded.ids.tolist() for encoded in WORDS.encode(rows) if encoded is not None]
    with ThreadPoolExecutor(4) as pool:
        together = [row for [row] in pool.map(lambda row: WORDS.encode([row]), rows * 3)]
    assert [row.ids.tolist() for row in together if row is not None] == alone * 3
