"""Pieces of text: their sum is the tokenizer's own decoding, and no stop text shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.infer.text import AnswerText, PromptEnd, Vocabulary

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model")
VOCABULARY = Vocabulary(TOKENIZER)
BYTES = TOKENIZER.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
PARROT = [BYTES[byte] for byte in "🦜".encode()]


def gpt2s() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes, and some longer ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "Ġa", "ðŁ", "the"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")


def pieces(text: str, *stops: str) -> tuple[list[str], AnswerText]:
    answer = AnswerText(VOCABULARY, stops)
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
    answer = AnswerText(VOCABULARY, ())
    assert "".join(answer.add(token) for token in ids) == ""
    assert "�" in answer.end()


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_any_tokens_are_the_tokenizers_own_decoding(kind: str) -> None:
    """Drawn so that bytes, parts of characters, control tokens and ids that are no token stand side by side."""
    draw = random.Random(0)
    tokenizer = gpt2s() if kind == "gpt2" else TOKENIZER
    size, vocabulary = len(tokenizer), Vocabulary(tokenizer)
    odd = [*BYTES, *PARROT * 20, 0, 1, 2, size, size + 5] if kind == "sentencepiece" else [*range(size + 2)]
    parrot = PARROT if kind == "sentencepiece" else tokenizer.convert_tokens_to_ids(list("ðŁ¦ľ"))
    for _ in range(400):
        ids: list[int] = []
        while len(ids) < 12:
            ids += draw.choice([[draw.randrange(size)], [draw.choice(odd)], parrot[: draw.randrange(1, 5)]])
        answer = AnswerText(vocabulary, ())
        given = "".join([answer.add(token) for token in ids]) + answer.end()
        assert given == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_a_stop_text_of_bytes_ends_at_once() -> None:
    answer = AnswerText(VOCABULARY, ("\n\n",))
    ids = [*TOKENIZER("one", add_special_tokens=False)["input_ids"], BYTES[10], BYTES[10]]
    assert "".join(answer.add(token) for token in ids) == "one"
    assert answer.stop == "\n\n"
    # Where text stands between them, the second may still become invalid, and is held back.
    apart = AnswerText(VOCABULARY, ("\n\n",))
    ids = [BYTES[10], *TOKENIZER("one", add_special_tokens=False)["input_ids"], BYTES[10], BYTES[255]]
    assert "".join([apart.add(token) for token in ids]) + apart.end() == TOKENIZER.decode(ids)
    assert apart.stop is None


@pytest.mark.parametrize("prompt", ["The capital of France is", "", "größer 北京", "a 🦜", "a\n"])
@pytest.mark.parametrize("text", [" Paris, 北京", "s and more", "\n\n x"])
def test_what_goes_on_from_a_prompt_is_the_rest_of_the_whole(prompt: str, text: str) -> None:
    begin = TOKENIZER(prompt)["input_ids"]
    rest = TOKENIZER("x" + text, add_special_tokens=False)["input_ids"][1:]
    answer = AnswerText(VOCABULARY, (), PromptEnd.of(VOCABULARY, begin))
    given = "".join(answer.add(token) for token in rest) + answer.end()
    assert prompt + given == TOKENIZER.decode([*begin, *rest], skip_special_tokens=True)


class Watched(Sequence[int]):
    """Token ids, and how far back they were read."""

    def __init__(self, ids: list[int]):
        self.ids, self.lowest = ids, len(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:
        self.lowest = min(self.lowest, place)
        return self.ids[place]


def test_any_answer_to_the_end_of_any_prompt_is_the_rest_of_the_whole() -> None:
    """Of a prompt only the end is read; a prompt that ends with bytes of characters, whole and half, is still open."""
    draw = random.Random(1)
    size = len(TOKENIZER)
    letters = [BYTES[byte] for byte in "é北🦜\n".encode()]
    odd = [*BYTES, *PARROT * 20, 0, 1, 2, size, size + 5, *TOKENIZER.convert_tokens_to_ids(["▁", "▁take", "s"]) * 30]
    for _ in range(400):
        begin = [draw.choice([draw.randrange(size), draw.choice(odd)]) for _ in range(draw.randrange(60))]
        begin += draw.choice([[5000], [7000, 2], TOKENIZER.convert_tokens_to_ids(["▁"])])  # the bytes at the end are:
        run = letters[: draw.randrange(len(letters) + 1)]
        rest: list[int] = []
        while len(rest) < 8:
            rest += draw.choice([[draw.randrange(size)], [draw.choice(odd)], letters[len(run) :], PARROT[:2]])
        prompt = Watched([*begin, *run])
        answer = AnswerText(VOCABULARY, (), PromptEnd.of(VOCABULARY, prompt))
        given = "".join([answer.add(token) for token in rest]) + answer.end()
        whole = TOKENIZER.decode([*begin, *run, *rest], skip_special_tokens=True)
        shown = TOKENIZER.decode(begin, skip_special_tokens=True)
        half = bytes(BYTES.index(token) for token in run).decode("utf-8", "ignore")
        assert given == whole[len(shown) + len(half) :], (begin, run, rest)
        assert prompt.lowest >= len(begin) - 30


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
