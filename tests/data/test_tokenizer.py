"""The bundled tokenizer.json against mistral-common, and against transformers' habit of converting tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.rendering import MISTRAL_V1

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"


def test_ids_of_plain_texts_equal_mistral_common(
    tokenizer: PreTrainedTokenizerBase, reference_texts: list[dict[str, Any]]
) -> None:
    ids = tokenizer([row["text"] for row in reference_texts], add_special_tokens=False)["input_ids"]
    assert ids == [row["ids"] for row in reference_texts]


def test_decoding_gives_the_text_back(
    tokenizer: PreTrainedTokenizerBase, reference_texts: list[dict[str, Any]]
) -> None:
    # The metaspace itself reads as a space, in SentencePiece too.
    texts = [row["text"].replace("▁", " ") for row in reference_texts]
    assert [tokenizer.decode(row["ids"]) for row in reference_texts] == texts


@pytest.mark.parametrize("length", [1, 2, 3, 5, 15, 16, 17, 31, 47, 64])
def test_runs_of_spaces_use_the_longest_pieces_first(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    # One more than typed: the tokenizer opens every text with a space. The longest piece has 16, and none has 15.
    pieces = tokenizer.tokenize(" " * length)
    full, rest = divmod(length + 1, 16)
    tail = [14, 1] if rest == 15 else [rest] if rest else []
    assert [len(piece) for piece in pieces] == [16] * full + tail


def test_transformers_keeps_the_file_as_it_is(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path)
    ours, saved = (json.loads((folder / "tokenizer.json").read_text()) for folder in (MODEL, tmp_path))
    assert saved == ours
    text = "def f(x):\n        return  x"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == tokenizer(text)


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 32000
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    # Were padding </s>, collators that mask padding would mask the end of sequence as well.
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 32768
    assert tokenizer.chat_template == MISTRAL_V1


def test_the_beginning_of_sequence_comes_once(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert chat.count(1) == 1
    assert tokenizer("hi")["input_ids"] == [1, *tokenizer("hi", add_special_tokens=False)["input_ids"]]


def test_byte_fallback_leaves_no_text_unknown(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(map(chr, [*range(1, 0x300), *range(0x1F300, 0x1F700), *range(0xAC00, 0xAD00), 0x10FFFF]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
