"""Whatever a JSON file of a model holds, reading it gives an object or one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.checkpoint.json_file import NotJson, parse_json, read_json
from finetune.errors import AdapterError, ModelError

REFUSED = {
    "empty": (b"", "it is empty"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "Unexpected UTF-8 BOM"),
    "not UTF-8": (b'{"a": "\xe9"}', "it is not UTF-8 text (byte 7)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "it is not UTF-8 text (byte 0)"),
    "cut off": (b'{"a": [1, 2', "Expecting ',' delimiter: line 1 column 12"),
    "100,000 levels": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64 levels"),
    "65 levels": (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "it holds a whole number of 5,000 digits"),
    "4,000 digits": (b'{"a": ' + b"9" * 4000 + b"}", "it holds a whole number of 4,000 digits"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is written twice"),
    "half a pair": (b'{"a": "\\ud83d"}', "it holds half of a surrogate pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_such_file_holds(tmp_path: Path, case: str) -> None:
    content, reason = REFUSED[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_json(file, kind=AdapterError)
    text = str(caught.value)
    assert text.startswith("config.json is not valid JSON: ")
    assert reason in text
    assert text.endswith(f"where: {file}\n  fix: copy the file again")


def test_what_such_files_hold() -> None:
    deep = b"[" * 64 + b"]" * 64
    assert parse_json(b"[" + str(10**30).encode() + b', NaN, "\\ud83d\\ude00"]')[::2] == [10**30, "\U0001f600"]
    assert parse_json(deep) is not None
    assert parse_json(b'{"a": 1, "a": 2}', unique_keys=False) == {"a": 2}
    with pytest.raises(NotJson):
        parse_json(b"{'a': 1}")


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would be waited for; a folder, and a file without permission, raise in the middle of reading."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine").write_text("{}")
    (tmp_path / "list").write_text("[]")
    for name, says in {
        "folder": "folder is a folder",
        "pipe": "pipe is no regular file",
        "list": "list does not hold a JSON object",
        "nothing": "there is no nothing",
    }.items():
        with pytest.raises(AdapterError, match=says):
            read_json(tmp_path / name, kind=AdapterError)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)  # the tests may run as root, who may read everything
    with pytest.raises(ModelError, match=r"mine cannot be read: Permission denied\n.*\n  fix: check the file's perm"):
        read_json(tmp_path / "mine")
