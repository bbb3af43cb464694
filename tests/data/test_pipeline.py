"""Sources to rows on the disk: the same rows for any number of processes, kept, and all rows accounted for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.data import pipeline
from finetune.data.pipeline import Reading, cache_folder, encode_source
from finetune.data.rows import IGNORED
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.disk import staged
from finetune.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_QLORA_CACHE", str(tmp_path / "cache"))


def conversation(number: int, turns: int = 1) -> list[dict]:
    return [
        {"role": role, "content": f"{word} {number} of {turn}"}
        for turn in range(turns)
        for role, word in (("user", "question"), ("assistant", "answer"))
    ]


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def columns(dataset) -> dict:
    return {name: dataset[name][:] for name in dataset.column_names}


def test_rows_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path, monkeypatch):
    rows = [{"messages": conversation(i, 1 + i % 3)} for i in range(4500)]
    rows[7], rows[2100] = "{", {"messages": []}
    path = write(tmp_path / "rows.jsonl", rows)
    made = []
    for processes in (1, 3):
        monkeypatch.setenv("MOE_QLORA_CACHE", str(tmp_path / f"cache{processes}"))
        made.append(
            encode_source(Reading(Source(str(path))), tokenizer, Supervision(max_length=64), processes=processes)
        )
    one, three = made
    assert columns(one.dataset) == columns(three.dataset)
    assert one.ledger == three.ledger
    assert (one.ledger.rows, one.ledger.used, len(one.dataset)) == (4500, 4498, 4498)
    assert sorted(p for refusals in one.ledger.refused.values() for p in refusals.positions) == [8, 2101]


def test_counts_of_a_row_equal_a_count_by_hand(tokenizer, tmp_path):
    rows = [{"messages": conversation(i, 1 + i % 3)} for i in range(20)]
    rows[3]["messages"][0]["train"] = True
    rows[4]["messages"][1]["train"] = False
    path = write(tmp_path / "rows.jsonl", rows)
    made = encode_source(Reading(Source(str(path))), tokenizer, Supervision())
    for row, given in zip(made.dataset, rows, strict=True):
        assert row["tokens"] == len(row["input_ids"]) == len(row["labels"])
        assert row["supervised"] == sum(label != IGNORED for label in row["labels"])
        assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        learnt = [turn for turn in given["messages"] if turn["role"] == "assistant" and turn.get("train", True)]
        assert row["turns"] == row["turns_with_end"] == len(learnt)
        assert row["labels"].count(tokenizer.eos_token_id) == len(learnt)


def test_a_second_start_reads_what_the_first_wrote(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(i)} for i in range(5)])
    reading = Reading(Source(str(path)))
    first = encode_source(reading, tokenizer, Supervision())
    second = encode_source(reading, tokenizer, Supervision())
    assert (first.cached, second.cached) == (False, True)
    assert columns(first.dataset) == columns(second.dataset)
    assert first.ledger == second.ledger


def test_kept_rows_that_are_damaged_are_made_again(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\nno row\n')
    reading = Reading(Source(str(path)))
    first = encode_source(reading, tokenizer, Supervision(max_length=32))
    (ledger,) = cache_folder().rglob("ledger.json")
    whole = ledger.read_text()
    for damaged in (whole[:-9], whole.replace('"rows": 2', '"rows": "x"'), "1" * 5000):
        ledger.write_text(damaged)
        again = encode_source(reading, tokenizer, Supervision(max_length=32))
        assert not again.cached
        assert (again.ledger, again.dataset.to_list()) == (first.ledger, first.dataset.to_list())
        assert ledger.read_text() == whole
    rows = ledger.with_name("rows.arrow").read_bytes()
    ledger.with_name("rows.arrow").write_bytes(rows[: len(rows) // 2])
    assert encode_source(reading, tokenizer, Supervision(max_length=32)).dataset.to_list() == first.dataset.to_list()
    assert encode_source(reading, tokenizer, Supervision(max_length=32)).cached


def test_rows_that_another_process_put_there_meanwhile_are_taken(tokenizer, tmp_path, monkeypatch):
    """Two processes of one launch begin with the same rows; the one that ends second finds the folder there."""
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(i)} for i in range(5)])
    made, others = pipeline._write, []

    def after_another(*arguments):
        monkeypatch.setattr(pipeline, "_write", made)
        others.append(encode_source(Reading(Source(str(path))), tokenizer, Supervision()))
        (folder,) = (cache_folder() / "rows").glob("[!.]*")
        others.append(folder.stat().st_ino)
        return made(*arguments)

    monkeypatch.setattr(pipeline, "_write", after_another)
    found = encode_source(Reading(Source(str(path))), tokenizer, Supervision())
    assert columns(found.dataset) == columns(others[0].dataset)
    (folder,) = (cache_folder() / "rows").iterdir()
    assert folder.stat().st_ino == others[1], "what another process may be reading was replaced"

    @contextlib.contextmanager
    def late(folder, *, replace):
        with staged(folder, replace=replace) as partial:
            yield partial
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(pipeline, "staged", late)
    assert len(encode_source(Reading(Source(str(path), max_rows=4)), tokenizer, Supervision()).dataset) == 4

    @contextlib.contextmanager
    def refused(folder, *, replace):
        yield tmp_path
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pipeline, "staged", refused)
    with pytest.raises(OSError, match="Permission denied"):
        encode_source(Reading(Source(str(path), max_rows=2)), tokenizer, Supervision())


@pytest.mark.parametrize("change", ["data", "template", "length", "policy", "loss", "rows"])
def test_whatever_the_rows_depend_on_makes_new_ones(own_tokenizer, tmp_path, change):
    tokenizer = own_tokenizer
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(i, 2)} for i in range(5)])
    encode_source(Reading(Source(str(path))), tokenizer, Supervision(max_length=64))
    supervision, rows = Supervision(max_length=64), None
    if change == "data":
        write(path, [{"messages": conversation(i, 2)} for i in range(1, 6)])
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("[INST] ", "[INST]  ")
    if change == "length":
        supervision = Supervision(max_length=65)
    if change == "policy":
        supervision = Supervision(max_length=64, too_long="drop")
    if change == "loss":
        supervision = Supervision(max_length=64, loss_on="last")
    if change == "rows":
        rows = 4
    assert not encode_source(Reading(Source(str(path), max_rows=rows)), tokenizer, supervision).cached


def test_positions_in_a_folder_name_the_file(tokenizer, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [{"messages": conversation(i)} for i in range(3)])
    write(folder / "b.jsonl", [{"messages": conversation(3)}, "{", {"messages": conversation(4)}])
    made = encode_source(Reading(Source(str(folder))), tokenizer, Supervision())
    assert [made.ledger.at(position) for position in made.dataset["position"]] == [
        *("a.jsonl line 1", "a.jsonl line 2", "a.jsonl line 3"),
        *("b.jsonl line 1", "b.jsonl line 3"),
    ]
    [refusals] = made.ledger.refused.values()
    assert [made.ledger.at(position) for position in refusals.positions] == ["b.jsonl line 2"]


def test_a_source_without_one_readable_row_is_refused(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", ["{", "[1]"])
    with pytest.raises(DataError) as refusal:
        encode_source(Reading(Source(str(path))), tokenizer, Supervision())
    assert "not one of the first rows can be read" in str(refusal.value)
    assert "rows.jsonl" in str(refusal.value)
    assert not (cache_folder() / "rows").exists()


def test_a_killed_start_leaves_no_rows_behind(tmp_path):
    """SIGKILL in the middle of tokenizing: the next start finds nothing that looks whole."""
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(i, 3)} for i in range(30000)])
    program = (
        "from finetune.data import Reading, Source, Supervision, apply_template, encode_source\n"
        "from finetune.moe.load import load_tokenizer\n"
        "tokenizer = load_tokenizer('recipes/tiny-mixtral/model'); apply_template(tokenizer, 'auto')\n"
        f"encode_source(Reading(Source({str(path)!r})), tokenizer, Supervision(), processes=2)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2], start_new_session=True)
    folder = cache_folder() / "rows"
    while child.poll() is None and not any(folder.glob(".*.partial/rows.arrow")):
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert list(folder.glob(".*.partial"))
    assert not [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def test_a_process_that_is_killed_is_said(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(i)} for i in range(3500)])
    monkeypatch.setattr("finetune.data.pipeline.Worker.__call__", lambda worker, chunk: os._exit(9))
    with pytest.raises(DataError) as refusal:
        encode_source(Reading(Source(str(path))), tokenizer, Supervision(), processes=2)
    assert "a process that tokenizes was killed" in str(refusal.value)
    assert "training.dataset_num_proc below 2" in str(refusal.value)
    assert not list((cache_folder() / "rows").iterdir())


def test_what_a_killed_start_left_goes_after_a_day(tokenizer, tmp_path):
    fresh, old = (cache_folder() / "rows" / f".{name}.partial" for name in ("fresh", "old"))
    for folder in (fresh, old):
        folder.mkdir(parents=True)
        (folder / "rows.arrow").write_bytes(b"half")
    os.utime(old, (0, 0))
    path = write(tmp_path / "rows.jsonl", [{"messages": conversation(1)}])
    encode_source(Reading(Source(str(path))), tokenizer, Supervision())
    assert fresh.is_dir()
    assert not old.exists()
