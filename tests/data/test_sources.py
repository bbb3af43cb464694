"""Every form of a source, and every way in which one can be wrong: one message each, with the place and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pandas as pd
import pytest
from datasets.exceptions import DatasetNotFoundError

from finetune.data import load_conversations
from finetune.errors import DataError

GOOD = [{"role": "user", "content": "  Où ?\n"}, {"role": "assistant", "content": "Ici  👍🏽."}]
WITH_SYSTEM = [{"role": "system", "content": "Sé breve."}, *GOOD, *GOOD]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chatml(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def refusal(path: Path, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_conversations(path, **kwargs)
    return str(caught.value)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"messages": GOOD, "id": 1}, {"messages": WITH_SYSTEM, "id": 2}]
    data = load_conversations(write_lines(tmp_path / "a.jsonl", *rows))
    assert data.column_names == ["messages"]
    assert data["messages"][:] == [GOOD, WITH_SYSTEM]


def test_json_list_and_json_lines_under_json(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"messages": GOOD}, {"messages": WITH_SYSTEM}], indent=1))
    write_lines(tmp_path / "lines.json", {"messages": GOOD}, {"messages": WITH_SYSTEM})
    for name in ("list.json", "lines.json"):
        assert load_conversations(tmp_path / name)["messages"][:] == [GOOD, WITH_SYSTEM]


def test_parquet_and_csv(tmp_path: Path) -> None:
    pd.DataFrame({"messages": [GOOD, WITH_SYSTEM]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"messages": [json.dumps(GOOD), json.dumps(WITH_SYSTEM)]}).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.parquet", "a.csv"):
        assert load_conversations(tmp_path / name)["messages"][:] == [GOOD, WITH_SYSTEM]


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    line = json.dumps({"messages": GOOD}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line)
    assert load_conversations(tmp_path / "a.jsonl")["messages"][:] == [GOOD, GOOD]


def test_chatml_text_is_recognized_and_exact(tmp_path: Path) -> None:
    # The form of OpenAssistant/oasst_top1_2023-08-25.
    path = write_lines(tmp_path / "a.jsonl", {"text": chatml(GOOD)}, {"text": chatml(WITH_SYSTEM)})
    for form in ("auto", "chatml_text"):
        assert load_conversations(path, format=form)["messages"][:] == [GOOD, WITH_SYSTEM]


def test_a_folder_and_its_splits(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"messages": GOOD}, {"messages": WITH_SYSTEM})
    write_lines(tmp_path / "test.jsonl", {"messages": WITH_SYSTEM})
    assert load_conversations(tmp_path)["messages"][:] == [GOOD, WITH_SYSTEM]
    assert load_conversations(tmp_path, split="test")["messages"][:] == [WITH_SYSTEM]
    assert load_conversations(tmp_path, split="train[1:]")["messages"][:] == [WITH_SYSTEM]


def test_a_trailing_user_turn_is_kept_as_context(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": [*GOOD, GOOD[0]]})
    assert load_conversations(path)["messages"][:] == [[*GOOD, GOOD[0]]]


def test_slices_and_the_first_rows(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": str(i)}, GOOD[1]] for i in range(4100)]  # more than two chunks
    path = write_lines(tmp_path / "a.jsonl", *({"messages": row} for row in rows))
    assert load_conversations(path)["messages"][:] == rows
    assert load_conversations(path, max_rows=3)["messages"][:] == rows[:3]
    assert load_conversations(path, max_rows=9999)["messages"][:] == rows
    assert load_conversations(path, split="train[50%:]")["messages"][:] == rows[2050:]
    assert load_conversations(path, split="train[-5:]", max_rows=2)["messages"][:] == rows[-5:-3]


def test_the_first_rows_do_not_wait_for_faults_behind_them(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": GOOD}, {"messages": []})
    assert len(load_conversations(path, max_rows=1)) == 1


# ---- what is not there ----------------------------------------------------------------------------------------------


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write_lines(tmp_path / "training.jsonl", {"messages": GOOD})
    write_lines(tmp_path / "heldout.jsonl", {"messages": GOOD})
    text = refusal(tmp_path / "trainig.jsonl")
    assert "there is no data file 'trainig.jsonl'" in text
    assert "what is there: training.jsonl\n" in text
    assert str(tmp_path) in text


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"there is no folder '{tmp_path / 'nowhere'}'" in refusal(tmp_path / "nowhere" / "a.jsonl")


def test_a_relative_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("messages\n")
    assert "what is there: train.csv" in refusal(Path("trainn.csv"))


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_conversations("someone/no-such-data")
    assert "neither a local file or folder nor a data set that the hub could be asked for" in str(caught.value)
    assert "connect to the network" in str(caught.value)


def test_a_hub_id_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer_of_the_hub(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'someone/no-such-data' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.data.sources.load_dataset", answer_of_the_hub)
    with pytest.raises(DataError, match="the hub has no data set 'someone/no-such-data' that you may read") as caught:
        load_conversations("someone/no-such-data")
    assert "hf auth login" in str(caught.value)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    text = refusal(tmp_path / "a.txt")
    assert "a data file that ends in '.txt' is not read" in text
    assert ".jsonl, .json, .parquet, .csv" in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "the data file is empty" in refusal(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "messages\n")])
def test_no_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert "the data set holds no rows" in refusal(tmp_path / name)


def test_an_empty_folder(tmp_path: Path) -> None:
    text = refusal(tmp_path)
    assert "the data set cannot be read" in text
    assert str(tmp_path) in text


def test_an_unknown_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"messages": GOOD})
    write_lines(tmp_path / "test.jsonl", {"messages": GOOD})
    text = refusal(tmp_path, split="heldout")
    assert "there is no split 'heldout'" in text
    assert "train, test" in text
    text = refusal(tmp_path / "train.jsonl", split="test")
    assert "there is no split 'test'" in text
    assert "allowed: train, or a slice" in text
    assert "split 'train[5:]' holds no rows" in refusal(tmp_path / "train.jsonl", split="train[5:]")


# ---- what cannot be parsed ------------------------------------------------------------------------------------------


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    good = json.dumps({"messages": GOOD}).encode()
    lines = [good, b'{"messages": [', b"", good, b"[1, 2]", b'{"text": "\xff"}', b"7", b"[" * 200_000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    text = refusal(tmp_path / "a.jsonl")
    assert "5 of 7 conversations cannot be trained on" in text
    assert "line 2: not valid JSON: Expecting value at column 15" in text
    assert "lines 5, 7: valid JSON, but not an object" in text
    assert "line 6: not UTF-8 at byte 11" in text
    assert "line 8: nested too deeply" in text


def test_a_malformed_json_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"messages": []},\n {]')
    assert "not valid JSON: Expecting property name enclosed in double quotes: line 2" in refusal(tmp_path / "a.json")


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    assert "the file is not Parquet" in refusal(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(b"messages\n\xff\xfe\n")
    assert "the file is not CSV" in refusal(tmp_path / "a.csv")


def test_a_folder_with_a_malformed_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"messages": [}\n')
    text = refusal(tmp_path)
    assert "the data set cannot be read" in text
    assert "name a single file of it" in text


# ---- what cannot be trained on --------------------------------------------------------------------------------------


def test_no_usable_column(tmp_path: Path) -> None:
    text = refusal(write_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}))
    assert "no column holds conversations; the columns are: prompt, completion" in text
    assert "`messages`" in text
    assert "`text`" in text
    text = refusal(write_lines(tmp_path / "b.jsonl", {"text": "just prose"}))
    assert "the columns are: text" in text
    text = refusal(write_lines(tmp_path / "c.jsonl", {"messages": GOOD}), format="chatml_text")
    assert "data.format chatml_text needs a column `text`; the columns are: messages" in text


def test_unknown_roles_are_named_with_their_rows(tmp_path: Path) -> None:
    bad = [{"role": "bot", "content": "x"}, *GOOD]
    rows = [GOOD if i % 3 else bad for i in range(40)]
    text = refusal(write_lines(tmp_path / "a.jsonl", *({"messages": row} for row in rows)))
    assert "14 of 40 conversations cannot be trained on" in text
    assert "lines 1, 4, 7, 10, 13, 16, 19, 22 and 6 more: role 'bot' is unknown" in text
    assert "roles system, user, assistant" in text
    pd.DataFrame({"messages": rows}).to_parquet(tmp_path / "a.parquet")
    assert "rows 1, 4, 7" in refusal(tmp_path / "a.parquet")


def user(content: Any = "a") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "b") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([user(), assistant(None)], "content of message 2 is null, not a string"),
        ([user(["a"]), assistant()], "content of message 1 is a list, not a string"),
        ([user({"text": "a"}), assistant()], "content of message 1 is a mapping, not a string"),
        ([user(7), assistant()], "content of message 1 is a number, not a string"),
        ([user(True), assistant()], "content of message 1 is a truth value, not a string"),
        ([user("\ud800"), assistant()], "content of message 1 is not valid Unicode (a lone surrogate)"),
        ([user()], "no assistant turn, so nothing to learn"),
        ([assistant()], "message 1 is of assistant where user should speak"),
        ([user(), user(), assistant()], "message 2 is of user where assistant should speak"),
        ([user(), assistant(), assistant()], "message 3 is of assistant where user should speak"),
        ([{"role": "system", "content": "s"}, assistant()], "message 2 is of assistant where user should speak"),
        ([user(), {"role": "system", "content": "s"}, assistant()], "message 2 is of system where assistant should"),
        ([{"role": "user"}, assistant()], "message 1 is not a mapping with `role` and `content`"),
        (["a", "b"], "message 1 is not a mapping with `role` and `content`"),
        ([{"role": ["user"], "content": "a"}, assistant()], "role ['user'] is unknown"),
        ([], "`messages` is empty"),
        (None, "`messages` is missing"),
        ("hello", "`messages` is a string that is not JSON"),
        ('"hello"', "`messages` is a string, not a list"),
        (3, "`messages` is a number, not a list"),
    ],
)
def test_a_conversation_that_teaches_nothing_sound(tmp_path: Path, messages: Any, fault: str) -> None:
    text = refusal(write_lines(tmp_path / "a.jsonl", {"messages": GOOD}, {"messages": messages}))
    assert "1 of 2 conversations cannot be trained on" in text
    assert f"line 2: {fault}" in text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("plain <|im_start|>user\na<|im_end|>", "`text` is not ChatML from its beginning to its end"),
        (chatml(GOOD) + "<|im_start|>user\nunfinished", "`text` is not ChatML from its beginning to its end"),
        ("<|im_start|>prompter\na<|im_end|><|im_start|>assistant\nb<|im_end|>", "role 'prompter' is unknown"),
        (5, "`text` is a number, not a string"),
        (None, "`text` is missing"),
    ],
)
def test_text_that_is_not_chatml(tmp_path: Path, text: Any, fault: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": chatml(GOOD)}, {"text": text})
    assert f"line 2: {fault}" in refusal(path)


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": [user()]}, {"messages": GOOD}, {"text": "x"}, 5)
    text = refusal(path)
    assert "3 of 4 conversations cannot be trained on" in text
    assert "line 1: no assistant turn" in text
    assert "line 3: `messages` is missing" in text
    assert "line 4: valid JSON, but not an object" in text
    assert text.count("fix: ") == 1
