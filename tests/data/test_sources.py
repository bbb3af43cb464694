"""Every kind of source gives the rows that were put into it, and every mistake in naming one has a message.

What is read is compared with what was written, with Python's own lines, with pandas for CSV, and with `datasets` for
slices, folders and their splits.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

from finetune.data.pipeline import Reading, form_of
from finetune.data.reading import Reader, rows_of, sample_row
from finetune.data.rows import RawChunk, RowFault
from finetune.data.sources import DatasetReader, Source, StreamReader, open_source
from finetune.errors import DataError

ROWS = [{"text": f"{i}: Où ?\n“x”, 👍🏽\t", "number": str(i)} for i in range(2500)]  # more than two chunks


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).removeprefix(".")
    if suffix in ("jsonl", "ndjson"):
        path.write_bytes(as_lines(rows))
    elif suffix.endswith(".gz"):
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    elif suffix in ("csv", "tsv"):
        pd.DataFrame(rows).to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    else:
        assert suffix == "arrow"
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=600)
    return path


def read(source: Source | Path) -> list[Any]:
    reader = open_source(source if isinstance(source, Source) else Source(str(source)))
    return [row for chunk in chunks_of(reader) for _, row in rows_of(chunk)]


def chunks_of(reader: Reader) -> Iterator[RawChunk]:
    """All chunks, with the promises of every reader checked on the way."""
    size, unit = reader.size()
    assert unit in ("bytes", "rows")
    reached, position = 0, 0
    for chunk, done in reader.chunks(5):
        assert chunk.source == 5
        assert chunk.first > position
        position = chunk.first + len(chunk.lines if chunk.lines is not None else chunk.values or []) - 1
        assert reached <= done <= size, "progress runs on and ends at the size"
        reached = done
        yield chunk
    assert size - reached <= 8  # an Arrow stream ends in a mark of 8 bytes


def refusal(path: Path | str, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(Source(str(path), **kwargs)).chunks(0))
    return str(caught.value)


# ---- what is read ---------------------------------------------------------------------------------------------------

KINDS = ["jsonl", "ndjson", "json", "parquet", "csv", "tsv", "arrow", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", ROWS)
    assert read(path) == ROWS
    reader = open_source(Source(str(path)))
    assert reader.count() == len(ROWS)
    assert reader.unit == ("line" if "jsonl" in suffix or "ndjson" in suffix else "row")
    assert reader.locate(17) == f"a.{suffix} {reader.unit} 17"
    assert read(Source(str(path), max_rows=1700)) == ROWS[:1700]
    assert read(Source(str(path), split="train[-40%:]")) == ROWS[1500:]


def test_an_arrow_file_and_a_suffix_in_capitals(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "a.ARROW"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    assert read(path) == ROWS


def test_json_in_its_other_layouts(tmp_path: Path) -> None:
    rows = ROWS[:3]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    layouts = {
        "lines": (as_lines(rows), rows),
        "object": (json.dumps({"version": "1", "data": rows}, indent=1).encode(), rows),
        "one row": (as_lines(rows[:1]), rows[:1]),
        "one conversation": (json.dumps({"messages": turns}, indent=1).encode(), [{"messages": turns}]),
        "with a mark": (b"\xef\xbb\xbf\n " + json.dumps(rows).encode(), rows),
    }
    for name, (content, expected) in layouts.items():
        (tmp_path / f"{name}.json").write_bytes(content)
        assert read(tmp_path / f"{name}.json") == expected, name


def test_json_with_a_list_for_each_split(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", "train": ROWS[:3], "test": ROWS[3:5]}))
    assert read(path) == ROWS[:3]
    assert read(Source(str(path), "test")) == ROWS[3:5]
    assert read(Source(str(path), "train[1:]+test[:1]")) == ROWS[1:4]
    assert open_source(Source(str(path), "test")).locate(2) == "a.json, test, row 2"
    assert "allowed: train, test" in refusal(path, split="dev")


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    found = [row for chunk in chunks_of(open_source(Source(str(tmp_path / "a.jsonl")))) for row in rows_of(chunk)]
    assert found == [(1, {"a": 1}), (4, {"a": 2})]


def test_lines_are_those_of_python_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(0)
    for block in (1, 2, 5, 64):
        monkeypatch.setattr("finetune.data.reading.BLOCK", block)
        content = b"x" + bytes(dice.choice(b"ab\r\n\n \xff") for _ in range(400))
        (tmp_path / "a.jsonl").write_bytes(content)
        with (tmp_path / "a.jsonl").open("rb") as file:
            expected = [line.removesuffix(b"\n") if line.strip() else b"" for line in file]
        reader = open_source(Source(str(tmp_path / "a.jsonl")))
        found: dict[int, bytes] = {}
        for chunk in chunks_of(reader):
            found |= dict(enumerate(chunk.lines or [], start=chunk.first))
        assert found == dict(enumerate(expected, start=1))
        assert reader.count() == sum(1 for line in expected if line)


def test_csv_is_that_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('a,"b ""c""",d\r\n1,"x\n,\r\ny",\r\n\r\n"", ü ,"""q"""\r\n'.encode())
    expected = pd.read_csv(path, dtype=str, na_filter=False).to_dict("records")
    assert len(expected) == 2
    assert read(path) == expected
    path.write_text("messages\n" + "x" * 300_000)  # more than the csv module's own limit
    assert read(path) == [{"messages": "x" * 300_000}]


# ---- slices, folders, splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["train", "train[:1000]", "train[10:20]", "train[10%:]", "train[-5:]", "train[:-2490]", "train[33%:34%]"]
    + ["train[:9999]", "train[1999:2001]", "train[:3]+train[-3:]", "train[50%:] + train[:10%]"],
)
def test_slices_are_those_of_datasets(tmp_path: Path, spec: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 1200))  # empty lines are not counted
    expected = load_dataset("json", data_files=str(path), split=spec.replace(" ", "")).to_list()
    reader = open_source(Source(str(path), split=spec))
    assert [row for chunk, _ in reader.chunks(0) for _, row in rows_of(chunk)] == expected
    assert read(Source(str(path), split=spec, max_rows=2)) == expected[:2]


LAYOUTS = [
    ["train.jsonl", "test.jsonl"],
    ["train-00000.jsonl", "train-00001.jsonl", "dev_1.jsonl", "README.md"],
    [
        "data/train_sft-00000-of-00002.parquet",
        "data/train_sft-00001-of-00002.parquet",
        "data/gen-00000-of-00001.parquet",
    ],
    ["train/a.jsonl", "train/b.jsonl", "validation/test.jsonl"],
    ["my-training-set/x.jsonl", "eval.1/x.jsonl"],
    ["b.jsonl", "a.jsonl", "sub/c.jsonl", "trained.jsonl", "dataset_infos.json", ".hidden/train.jsonl"],
    ["some_train_file.csv", "my.eval.csv"],
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_a_folder_has_the_splits_of_datasets(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        if name.endswith((".md", "infos.json")):
            (tmp_path / name).write_text("{}")
        else:
            write(tmp_path / name, [{"text": f"{number} {i}"} for i in range(3)])
    expected = load_dataset(str(tmp_path))
    for split, rows in expected.items():
        assert read(Source(str(tmp_path), split=split)) == rows.to_list()
        assert read(Source(str(tmp_path), split=f"{split}[2:]")) == rows.to_list()[2:]
    text = refusal(tmp_path, split="other")
    assert "there is no split 'other'" in text
    assert f"allowed: {', '.join(expected)}, or a slice" in text


def test_a_split_of_another_name_is_found_in_the_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "heldout.jsonl", ROWS[2:4])
    write(tmp_path / "test_gen.part.jsonl", ROWS[4:6])
    assert read(Source(str(tmp_path), split="heldout")) == ROWS[2:4]
    assert read(Source(str(tmp_path), split="test_gen")) == ROWS[4:6]


def test_a_folder_of_mixed_kinds_names_the_file_of_a_row(tmp_path: Path) -> None:
    parts = {
        "a.jsonl": ROWS[:1400],
        "b.parquet": ROWS[1400:1403],
        "c.csv": ROWS[1403:1410],
        "d/e.json": ROWS[1410:1412],
    }
    for name, rows in parts.items():
        write(tmp_path / name, rows)
    (tmp_path / "a0.jsonl").touch()
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"\n\n")
    assert read(tmp_path) == ROWS[:1412]
    reader = open_source(Source(str(tmp_path)))
    assert reader.unit == "row"
    assert reader.count() == 1412
    located = [reader.locate(p) for chunk in list(chunks_of(reader)) for p, _ in rows_of(chunk)]
    expected = [
        f"{name} {'line' if name == 'a.jsonl' else 'row'} {i + 1}" for name, r in parts.items() for i in range(len(r))
    ]
    assert located == expected
    for spec in ("train[-4:]", "train[1399:1405]", "train[-3:]+train[:2]"):
        part = open_source(Source(str(tmp_path), split=spec))
        rows = [(part.locate(p), row) for chunk in list(chunks_of(part)) for p, row in rows_of(chunk)]
        for where, row in rows:
            assert where == expected[ROWS.index(row)]


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == ROWS
    assert read(Source(str(tmp_path / "one"), split="train[-3:]")) == ROWS[-3:]
    both = DatasetDict({"train": Dataset.from_list(ROWS[:5]), "gen": Dataset.from_list(ROWS[5:8]).select([2, 0])})
    both.save_to_disk(tmp_path / "two")
    assert read(Source(str(tmp_path / "two"), split="gen")) == [ROWS[7], ROWS[5]]
    assert "allowed: train, gen, or" in refusal(tmp_path / "two", split="test")
    assert "allowed: train, or" in refusal(tmp_path / "one", split="test")
    write(tmp_path / "three" / "a.jsonl", ROWS[:2])
    (tmp_path / "three" / "state.json").write_text('{"somebody": "else\'s"}')  # is no mark of `save_to_disk` alone
    assert read(tmp_path / "three") == [*ROWS[:2], {"somebody": "else's"}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("state.json", "{}", "state.json does not fit: `_data_files` is missing"),
        ("state.json", '{"_data_files": [{"filename": 5}]}', "`_data_files[0].filename` cannot be 5"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "there is no file 'gone.arrow'"),
        ("state.json", "[" * 100_000, "state.json is not valid JSON"),
        ("dataset_dict.json", '{"splits": "train"}', "`splits` cannot be 'train'"),
    ],
)
def test_a_damaged_folder_of_save_to_disk(tmp_path: Path, name: str, content: str, says: str) -> None:
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content)
    assert says in refusal(tmp_path / "saved")


def test_the_sample_row_has_every_column_of_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": null}\nnot json\n[]\n{"a": 1, "s": null}\n{"a": 2, "s": "x"}\n{"late": 1}\n')
    reader = open_source(Source(str(path)))
    assert sample_row(reader, among=3) == {"a": 1, "s": "x"}
    assert sample_row(reader) == {"a": 1, "s": "x", "late": 1}
    path.write_bytes(b"not json\n")
    assert sample_row(open_source(Source(str(path)))) == {}


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_what_datasets_gives_from_its_cache_and_as_a_stream() -> None:
    data = Dataset.from_list(ROWS)
    for reader in (
        DatasetReader(data, name="who/what", split="train"),
        StreamReader(data.to_iterable_dataset(), name="who/what", split="train", rows=2500, revision="abc"),
    ):
        for _ in range(2):
            assert [row for chunk in chunks_of(reader) for _, row in rows_of(chunk)] == ROWS
        assert reader.count() == 2500
        assert reader.locate(7) == "who/what, split train, row 7"
        assert reader.fingerprint() == reader.fingerprint()


def test_a_stream_and_slices_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder stands for the data set of the hub: `datasets` streams both in the same way.
    write(tmp_path / "real" / "train.jsonl", ROWS)
    real, monkey = str(tmp_path / "real"), monkeypatch
    monkey.setattr("finetune.data.sources.load_dataset", lambda _, **kwargs: load_dataset(real, **kwargs))
    monkey.setattr("finetune.data.sources.load_dataset_builder", lambda _: datasets.load_dataset_builder(real))
    monkey.setattr("finetune.data.sources.get_dataset_split_names", lambda _: datasets.get_dataset_split_names(real))
    for spec, expected in (("train", ROWS), ("train[10:1200]", ROWS[10:1200]), ("train[-2:]", ROWS[-2:])):
        for streaming in (True, False):
            reader = open_source(Source("who/what", split=spec, streaming=streaming))
            assert [row for chunk, _ in reader.chunks(0) for _, row in rows_of(chunk)] == expected
    for streaming in (True, False):
        text = refusal("who/what", split="test", streaming=streaming)
        assert "there is no split 'test'" in text
        assert "allowed: train, or" in text


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        text = refusal("someone/no-such-data", streaming=streaming)
        assert "neither a local file or folder nor a data set that the hub could be asked for" in text
        assert "connect to the network" in text


@pytest.mark.parametrize(
    ("complaint", "expected", "fix"),
    [
        (
            DatasetNotFoundError("Dataset doesn't exist"),
            "the hub has no data set 'a/b' that you may read",
            "hf auth login",
        ),
        (
            ValueError("Config name is missing.\nPick one"),
            "cannot be read: Config name is missing. Pick one",
            "hf download",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "Dataset scripts are no longer", "hf download"),
    ],
)
def test_what_the_hub_complains_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, complaint: Exception, expected: str, fix: str
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise complaint

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.data.sources.load_dataset", answer)
    text = refusal("a/b")
    assert expected in text
    assert fix in text


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "train.jsonl", ROWS)
    moved = tmp_path / "b" / "other.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(path, moved)
    seen = set()

    def of(source: Source) -> str:
        return open_source(source).fingerprint()

    assert of(Source(str(path))) == of(Source(str(moved)))
    assert of(Source(str(path.parent))) == of(Source(str(moved.parent)))
    for spec, limit in (
        ("train", None),
        ("train", 5),
        ("train", 6),
        ("train[1:6]", None),
        ("train[:1]+train[5:]", None),
    ):
        seen.add(of(Source(str(path), split=spec, max_rows=limit)))
    shutil.copyfile(path, tmp_path / "a.ndjson")
    moved.write_bytes(path.read_bytes().replace(b"17: ", b"71: "))
    write(path.parent / "train2.jsonl", ROWS[:1])
    seen |= {of(Source(str(path.parent))), of(Source(str(tmp_path / "a.ndjson"))), of(Source(str(moved)))}
    assert len(seen) == 8


def test_a_large_file_is_known_by_its_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = open_source(Source(str(path))).fingerprint()
    monkeypatch.setattr("finetune.data.fileformats._HASHED_WHOLE", 1000)
    quick = open_source(Source(str(path))).fingerprint()
    assert quick != whole
    path.write_bytes(path.read_bytes())
    assert open_source(Source(str(path))).fingerprint() != quick


# ---- rows that cannot be read ---------------------------------------------------------------------------------------


def faults(path: Path) -> tuple[list[Any], dict[int, str]]:
    """Usable rows, and reasons by position."""
    found = [pair for chunk, _ in open_source(Source(str(path))).chunks(0) for pair in rows_of(chunk)]
    usable = [row for _, row in found if not isinstance(row, RowFault)]
    return usable, {position: str(row) for position, row in found if isinstance(row, RowFault)}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv"])
def test_a_giant_line_is_refused_and_not_kept(tmp_path: Path, suffix: str) -> None:
    giant = b"x" * ((64 << 20) + 1)
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_bytes(b"a\n1\n" + giant + b"\n2\n")
        reason = "bytes that cannot be read (bad UTF-8, a line beyond 64 MiB, or the end of a damaged file)"
        assert faults(path) == ([{"a": "1"}, {"a": "2"}], {2: reason})
        return
    content = b'{"a": 1}\n' + giant + b'\n\n{"a": 2}\n' + giant
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
    assert faults(path) == ([{"a": 1}, {"a": 2}], {2: "longer than 64 MiB", 5: "longer than 64 MiB"})


def test_a_line_cut_off_and_a_compressed_file_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS[:3])[:-9])
    assert faults(path) == (ROWS[:2], {3: "not valid JSON: it ends in the middle of a value"})
    noise = [{"a": random.Random(i).randbytes(20_000).hex()} for i in range(200)]  # 8 MB that do not compress away
    whole = gzip.compress(as_lines(noise))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(whole[: len(whole) // 2])
    usable, reasons = faults(packed)
    assert usable == noise[: len(usable)]
    assert len(usable) > 50
    assert reasons == {len(usable) + 1: "the compressed file is damaged or ends too early"}


def test_cells_that_are_no_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n3\n4,5,6\n"7"x,8\n\xff,9\nx\x00y,10\n11,"12\n13,14\n')
    usable, reasons = faults(path)
    assert usable == [{"a": "1", "b": "2"}, {"a": "x\x00y", "b": "10"}]
    assert reasons == {
        **dict.fromkeys(
            (2, 3), "more or fewer cells than the header's 2; a text with commas in it goes in double quotes"
        ),
        4: "not CSV: ',' expected after '\"'",
        5: "bytes that cannot be read (bad UTF-8, a line beyond 64 MiB, or the end of a damaged file)",
        7: "not CSV: unexpected end of data",
    }


@pytest.mark.parametrize("mark", [";", "\t"])
def test_cells_that_other_marks_separate(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'question{mark}answer\n"a{mark}b, c"{mark}d\n')
    assert faults(path) == ([{"question": f"a{mark}b, c", "answer": "d"}], {})


def test_bad_bytes_in_a_column_cost_only_their_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    usable, reasons = faults(tmp_path / "a.parquet")
    assert usable == [{"text": "a"}, {"text": "c"}]
    assert reasons == {2: "a value that cannot be read (bad UTF-8, or out of its type's range)"}


# ---- what is not there, or not what its name says -------------------------------------------------------------------


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "training.jsonl", ROWS[:1])
    write(tmp_path / "heldout.jsonl", ROWS[:1])
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
    assert "what is there: train.csv" in refusal(Path("trainn.jsonl.gz"))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    text = refusal(tmp_path / "a.txt")
    assert "a data file that ends in '.txt' is not read" in text
    assert ".jsonl, .ndjson, .json, .parquet, .csv, .tsv, .arrow, .jsonl.gz" in text
    for suffix, fix in ((".xlsx", "save the sheet as CSV"), (".zip", "unpack it"), (".md", "plain text is not done")):
        (tmp_path / f"a{suffix}").write_text("hello")
        assert fix in refusal(tmp_path / f"a{suffix}")
    (tmp_path / "a.parquet.gz").write_text("hello")
    assert "a data file that ends in '.parquet.gz' is not read" in refusal(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("suffix", KINDS)
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    assert "the data file is empty" in refusal(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "messages\n")])
def test_no_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert "split 'train' of the data set holds no rows" in refusal(tmp_path / name)


def test_no_rows_in_a_slice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:5])
    for spec in ("train[5:]", "train[7:9]", "train[3:2]"):
        assert f"split '{spec}' of the data set holds no rows" in refusal(path, split=spec)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    text = refusal(tmp_path)
    assert "the folder holds no data files" in text
    assert str(tmp_path) in text


def test_an_unknown_split(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS[:2])
    text = refusal(path, split="test")
    assert "there is no split 'test'" in text
    assert "allowed: train, or a slice" in text
    text = refusal(path, split="train[2%:900%]")
    assert "split 'train[2%:900%]' is not understood" in text
    assert "train[10%:]" in text
    assert "split 'train[a:b]' is not understood" in refusal(path, split="train[a:b]")


def test_a_malformed_json_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"messages": []},\n {]')
    text = refusal(tmp_path / "a.json")
    assert "not valid JSON: Expecting property name enclosed in double quotes: line 2" in text
    assert "name it .jsonl if it holds one object a line" in text
    (tmp_path / "a.json").write_text("[" * 200_000)
    assert "not valid JSON" in refusal(tmp_path / "a.json")


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    for name, kind in (("a.parquet", "Parquet"), ("a.arrow", "Arrow"), ("a.json.gz", "gzip")):
        (tmp_path / name).write_bytes(b"none of these at all")
        assert f"the file is not {kind}: " in refusal(tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"m\xff\n1\n")
    assert "the file is not CSV: the header is not UTF-8" in refusal(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"m,n,m\n1,2,3\n")
    assert "the file is not CSV: the header names a column twice" in refusal(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b'"m\n1\n')
    assert "the file is not CSV: unexpected end of data" in refusal(tmp_path / "a.csv")


def test_a_file_that_is_damaged_further_on(tmp_path: Path) -> None:
    rows = [{"text": random.Random(i).randbytes(200).hex()} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000, compression="snappy")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 30_000] = bytes(30_000)
    (tmp_path / "a.parquet").write_bytes(content)
    text = refusal(tmp_path / "a.parquet")
    assert "the file is damaged after row" in text
    assert "fetch or write it again" in text
    write(tmp_path / "b.arrow", rows)
    (tmp_path / "b.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[:-300_000])
    assert "the file is damaged after row" in refusal(tmp_path / "b.arrow")


# ---- files of which nothing can be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"messages": []}\n'.encode("utf-16"), ("the file is UTF-16", "`iconv -f UTF-16 -t UTF-8")),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), ("the file is UTF-16",)),
        ("a.jsonl", b'[{"a": 1}]', ("a.jsonl line 1: valid JSON, but not an object", "name the file .json")),
        ("a.jsonl", b'[\n{"a": 1},\n{"a": 2}\n]\n', ("one JSON list over several lines", "name it a.json, or write")),
        ("a.jsonl", b"{'a': 1}\n", ("a.jsonl line 1: not valid JSON: ", "write each row with json.dumps")),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16-le"), ("the file is UTF-16",)),
        ("a.csv", b'prompt,completion\n"a,b\n', ("not CSV: unexpected end of data", "in double quotes")),
        (
            "a.jsonl",
            b'{\n  "a": 1\n}\n',
            ("a.jsonl line 1: not valid JSON: it ends in the middle", "one object a line"),
        ),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d",
            ("pointer of git-lfs", "git lfs pull"),
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", ("pointer of git-lfs",)),
        (
            "a.csv",
            b"prompt,completion\nO\xf9,l\xe0\n",
            ("a.csv row 1: bytes that cannot be read", "save the file as UTF-8"),
        ),
        ("a.jsonl", b"{}\n{}\n", ("a.jsonl line 1: an object without a column",)),
    ],
    ids=[
        "utf16",
        "utf16-csv",
        "list",
        "list-lines",
        "python",
        "utf16-le",
        "quote",
        "pretty",
        "lfs",
        "lfs-parquet",
        "cp1252",
        "empty",
    ],
)
def test_the_reason_of_the_first_row_where_none_can_be_read(
    tmp_path: Path, name: str, content: bytes, says: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    reading = Reading(Source(str(tmp_path / name)))
    with pytest.raises(DataError) as caught:
        form_of(open_source(reading.source), reading)
    assert caught.value.where == str(tmp_path / name)
    assert all(part in str(caught.value) for part in says), caught.value


def test_offsets_that_point_beyond_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    """Every offset of the texts in turn; reading one unchecked ends the process."""
    rows = [{"messages": [{"role": "user", "content": text * 3}], "n": 5} for text in "abcd"]
    table = pa.Table.from_pylist(rows)
    offsets = table.column("messages").chunk(0).values.field("content").buffers()[1]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sound = (tmp_path / "a.arrow").read_bytes()
    begin = sound.index(offsets.to_pybytes()[: 4 * 5])
    assert read(tmp_path / "a.arrow") == rows
    for place in range(begin, begin + 4 * 5):
        for byte in (0x7F, 0xFF):
            (tmp_path / "a.arrow").write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
            assert "the file is not Arrow: " in refusal(tmp_path / "a.arrow")
    (tmp_path / "a.arrow").write_bytes(sound.replace(b"ccc", b"c\xffc"))
    assert faults(tmp_path / "a.arrow")[1] == {3: "a value that cannot be read (bad UTF-8, or out of its type's range)"}
