"""The bundled probe and the user's own text: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.encoding import token_pieces
from finetune.errors import DataError
from finetune.router.study.probe import BUNDLED, read_probe
from tests.conftest import REPOSITORY

BOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny-mixtral" / "model")


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- the bundled text -----------------------------------------------------------------------------------------------


def test_the_bundled_probe_is_five_languages_and_code(tokenizer: PreTrainedTokenizerBase) -> None:
    probe = read_probe(tokenizer)
    assert probe.domains == ["english", "german", "french", "spanish", "italian", "code"]
    assert probe.name == "bundled"
    sizes = Counter(row.domain for row in probe.rows for _ in row.ids)
    assert all(2_500 < size < 6_000 for size in sizes.values()), sizes
    assert probe.describe() == {"name": "bundled", "rows": 84, "tokens": sum(sizes.values())}
    assert all(row.ids[0] == BOS and row.ids.count(BOS) == 1 and len(row.ids) <= 512 for row in probe.rows)
    # The text comes back from its tokens, and each passage of a language has its parallel in the others.
    passages = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    assert [tokenizer.decode(row.ids[1:]).strip() for row in probe.rows] == [row["text"].strip() for row in passages]
    lines = {domain: [row["text"].count("\n") for row in passages if row["domain"] == domain] for domain in sizes}
    assert lines["english"] == lines["german"] == lines["french"] == lines["spanish"] == lines["italian"]


def test_the_readme_of_the_probe_counts_it_and_names_licences() -> None:
    about = BUNDLED.with_suffix(".md").read_text(encoding="utf-8")
    passages = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    for domain in ("english", "code"):
        texts = [row["text"] for row in passages if row["domain"] == domain]
        assert f"| {domain} | {len(texts)} | {sum(map(len, texts)):,} |" in about
    assert "Django Software Foundation" in about
    assert "BSD-3-Clause" in about


@pytest.mark.parametrize("limit", [100, 1_000, 20_000])
def test_a_limit_is_shared_evenly(tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    whole = read_probe(tokenizer)
    probe = read_probe(tokenizer, max_tokens=limit)
    sizes = Counter(row.domain for row in probe.rows for _ in row.ids)
    # A row of one token would have no neighbour; at most one is left away in each domain.
    assert limit - 6 <= probe.tokens <= limit
    if limit < 15_000:  # the smallest domain has 2,945
        assert max(sizes.values()) - min(sizes.values()) <= 2
    else:
        assert sizes["english"] == sum(len(row.ids) for row in whole.rows if row.domain == "english")
    for domain in sizes:
        got = [token for row in probe.rows if row.domain == domain for token in row.ids]
        assert got == [token for row in whole.rows if row.domain == domain for token in row.ids][: len(got)]


# ---- the user's text ------------------------------------------------------------------------------------------------


def test_rows_with_text_and_domain(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"domain": "law", "text": "First."}, {"domain": "art", "text": "Second </s> one."}, {"text": "Third."}]
    probe = read_probe(tokenizer, [write_rows(tmp_path / "mine.jsonl", rows)])
    assert [row.domain for row in probe.rows] == ["law", "art", "mine"]
    # A control token that somebody typed stays text.
    assert all(tokenizer.eos_token_id not in row.ids for row in probe.rows)
    assert tokenizer.decode(probe.rows[1].ids[1:]) == "Second </s> one."


def test_plain_text_is_cut_into_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "All happy families are alike; every unhappy one is unhappy in its own way.\n" * 80
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    probe = read_probe(tokenizer, [str(tmp_path / "novel.txt")], row_tokens=128)
    assert probe.domains == ["novel"]
    assert [len(row.ids) for row in probe.rows[:-1]] == [128] * (len(probe.rows) - 1)
    assert all(row.ids[0] == BOS for row in probe.rows)
    whole = [token for row in probe.rows for token in row.ids[1:]]
    assert tokenizer.decode(whole).strip() == text.strip()


def test_conversations_take_the_chat_template(tokenizer: PreTrainedTokenizerBase, conversations: Path) -> None:
    probe = read_probe(tokenizer, [str(conversations)])
    assert len(probe.rows) == 32
    messages = json.loads(conversations.read_text(encoding="utf-8").splitlines()[3])["messages"]
    assert probe.rows[3].ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_several_files_are_several_domains(
    tokenizer: PreTrainedTokenizerBase, conversations: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n\nSome words that stand here.\n", encoding="utf-8")
    probe = read_probe(tokenizer, [str(tmp_path / "notes.md"), str(conversations)], max_tokens=200)
    assert probe.domains == ["notes", "rows"]
    assert probe.tokens <= 200


def test_reading_stops_where_enough_was_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The line that is no JSON lies beyond what 50 tokens need, so nobody counts it."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "some words to read here"}\n' * 2_000 + "no json\n" * 3, encoding="utf-8")
    assert read_probe(tokenizer, [str(path)], max_tokens=50).refused == 0
    assert read_probe(tokenizer, [str(path)]).refused == 3


def test_rows_that_cannot_be_read_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "Good text."}, {"text": 7}, {"domain": "x"}, {"text": "  "}])
    probe = read_probe(tokenizer, [path])
    assert len(probe.rows) == 1
    assert probe.refused == 2


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_an_empty_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="the data file is empty"):
        read_probe(tokenizer, [str(tmp_path / "empty.jsonl")])
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_probe(tokenizer, [str(tmp_path / "blank.txt")])
    assert "the file holds no text to route: every passage is empty" in str(caught.value)
    assert "bundled probe" in str(caught.value)


def test_a_file_of_other_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column holds conversations; the columns are: number"):
        read_probe(tokenizer, [write_rows(tmp_path / "numbers.jsonl", [{"number": 3}])])


def test_a_file_that_is_not_there(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data file 'gone\.jsonl'"):
        read_probe(tokenizer, [str(tmp_path / "gone.jsonl")])


def test_a_file_that_is_not_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe" * 9)
    with pytest.raises(DataError, match=r"the file is not text in UTF-8 \(invalid start byte at byte 0\)"):
        read_probe(tokenizer, [str(tmp_path / "photo.png")])


def test_too_few_tokens_to_share(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="5 tokens are too few for 6 domains"):
        read_probe(tokenizer, max_tokens=5)


# ---- the text of single tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Größe, naïve, déjà vu", "def f(x):\n    return x", "漢字 😀 end", ""])
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "<s>"
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)
