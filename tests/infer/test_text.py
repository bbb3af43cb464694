"""Pieces of text: their sum is the tokenizer's own decoding, and no stop text shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.infer.text import AnswerText

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model")


def pieces(text: str, *stops: str) -> tuple[list[str], AnswerText]:
    answer = AnswerText(TOKENIZER, stops)
    out = [answer.add(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    return [*out, answer.end()], answer


@pytest.mark.parametrize(
    "text", ["Hello there, you.", "größer 北京 🙂🙂 مرحبا", "def f(x):\n    return  x", "   spaces   ", "\n\n- a\n- b"]
)
def test_the_sum_is_the_whole(text: str) -> None:
    out, _ = pieces(text)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert "".join(out) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert not any("�" in piece for piece in out)


def test_an_incomplete_character_comes_at_the_end_only() -> None:
    ids = TOKENIZER("🦜", add_special_tokens=False)["input_ids"][:-1]
    answer = AnswerText(TOKENIZER, ())
    assert "".join(answer.add(token) for token in ids) == ""
    assert "�" in answer.end()


@pytest.mark.parametrize("prompt", ["The capital of France is", "", "größer 北京", "a 🦜"])
@pytest.mark.parametrize("text", [" Paris, 北京", "s and more", "\n\n x"])
def test_what_goes_on_from_a_prompt_is_the_rest_of_the_whole(prompt: str, text: str) -> None:
    begin = TOKENIZER(prompt)["input_ids"]
    rest = TOKENIZER("x" + text, add_special_tokens=False)["input_ids"][1:]
    answer = AnswerText(TOKENIZER, (), begin)
    given = "".join(answer.add(token) for token in rest) + answer.end()
    assert prompt + given == TOKENIZER.decode([*begin, *rest], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("stops", "shown", "met"),
    [
        (("three",), "one two ", "three"),
        (("two three", "two"), "one ", "two"),
        (("e f", "three four"), "one two ", "three four"),
        (("our",), "one two three f", "our"),
        (("fourteen", "nothing"), "one two three four", None),
    ],
)
def test_stop_texts(stops: tuple[str, ...], shown: str, met: str | None) -> None:
    out, answer = pieces("one two three four", *stops)
    assert "".join(out) == shown
    assert answer.stop == met
    assert answer.add(5) == "" or met is None
