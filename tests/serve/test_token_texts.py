"""Bytes and texts of tokens against the text that was tokenized."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.serve.token_texts import TextOffset, TokenTexts, finite
from tests.serve.fake import MODEL

TEXT = "Hello  world,\n\tgrüße 東京 👩‍🚀 ▁ <0x41> done"


def test_mistrals_tokens_are_the_bytes_of_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(TEXT.replace("▁", "_"), add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer)
    # This tokenizer begins a text with a space of its own.
    assert b"".join(texts.spelled(token) for token in ids) == (" " + TEXT.replace("▁", "_")).encode()
    assert texts.shown(ids[0]) == " Hello"
    assert (texts.spelled(2), texts.shown(2)) == (b"</s>", "</s>")
    assert texts.shown(tokenizer.convert_tokens_to_ids("<0xF0>")) == "bytes:\\xf0"
    assert texts.spelled(len(tokenizer) + 5) == b""


def test_byte_level_tokens_are_the_bytes_of_the_text() -> None:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_tokens(["東京"])
    ids = tokenizer(TEXT)["input_ids"]
    texts = TokenTexts(tokenizer)
    assert b"".join(texts.spelled(token) for token in ids) == TEXT.encode()
    assert texts.shown(tokenizer.eos_token_id) == "<|end|>"


def test_offsets_count_characters() -> None:
    text = "aé東b"
    offset = TextOffset()
    begins = [offset.before(bytes([byte])) for byte in text.encode()]
    assert begins == [0, 1, 1, 2, 2, 2, 3]


def test_the_space_before_the_first_word_is_in_the_text() -> None:
    offset = TextOffset()
    assert [offset.before(token) for token in (b" a", b" bc", b"d")] == [0, 2, 5]


@pytest.mark.parametrize(("logprob", "told"), [(-1.5, -1.5), (float("-inf"), -9999.0), (None, None)])
def test_a_logprob_is_json(logprob: float | None, told: float | None) -> None:
    assert finite(logprob) == told
