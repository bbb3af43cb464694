"""Plausible mistakes of a first hour: each is answered by one message that names the way out, and writes nothing.

A row of the table has a name, the files that lie in the folder one works in, the command as one types it, and a regular
expression for the message with its fix (`.` matches a line's end too). MODEL is the folder of the bundled model, in
files and commands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY
from tests.running import contents, run_finetune

MODEL = str(REPOSITORY / "recipes" / "tiny-mixtral" / "model")


class Mistake(NamedTuple):
    name: str
    files: Mapping[str, str | bytes]
    command: str
    says: str
    status: int = 2  # 1 where a report says what is wrong


def recipe(data: str, more: str = "") -> str:
    """A recipe whose `data` section is this flow mapping, with further sections below."""
    return f"model: {{path: MODEL, device: cpu}}\ndata: {data}\noutput: {{dir: out}}\n{more}"


def checked(name: str, file: str, content: str | bytes, says: str, *, status: int = 2, keys: str = "") -> Mistake:
    """`finetune data check` of a recipe that trains on a file with this content; `keys` are more of `data`."""
    files = {file: content, "recipe.yaml": recipe(f"{{train: ./{file}{keys}}}")}
    return Mistake(name, files, "finetune data check recipe.yaml", says, status)


ROW = '{"question": "What is 1+1?", "answer": "2"}'

DATA = [
    checked("an empty file", "rows.jsonl", "", "the data file is empty.*fix: name a file that holds conversations"),
    checked(
        "UTF-16 as Excel and PowerShell write it",
        "rows.csv",
        "question,answer\na,b\n".encode("utf-16"),
        "the file is UTF-16.*fix: save it as UTF-8: `iconv -f UTF-16",
    ),
    checked(
        "a file that Windows wrote",
        "rows.csv",
        "question,answer\nWo ist das Café?,Da\n".encode("cp1252"),
        "rows.csv row 1: bytes that cannot be read.*fix: save the file as UTF-8.*iconv -f CP1252",
    ),
    checked(
        "a list of rows with a comma missing",
        "rows.json",
        f"[{ROW}\n{ROW}]",
        "not valid JSON: Expecting ',' delimiter: line 2.*fix: correct the file, or name it .jsonl",
    ),
    checked(
        "columns of other names",
        "rows.csv",
        "Frage,Antwort\na,b\n",
        "no column holds conversations; the columns are: Frage, Antwort.*"
        "fix: name the columns with question and answer: data.columns: {prompt: Frage, completion: Antwort}",
    ),
    checked(
        "two columns that could be the answer",
        "rows.csv",
        "question,answer,response\na,b,c\n",
        "`answer` and `response` could each be the answer.*fix: .*data.columns: {prompt: question, completion: answer}",
    ),
    checked(
        "data.columns the other way round",
        "rows.csv",
        "question,answer\na,b\n",
        "written the other way round: our name comes first.*fix: write data.columns: "
        "{prompt: question, completion: answer}",
        keys=", columns: {question: prompt, answer: completion}",
    ),
    checked(
        "a misspelled column in data.columns",
        "rows.csv",
        "question,answer\na,b\n",
        "data.columns.prompt needs a column `qestion`; the columns are: question, answer.*"
        "write data.columns: {prompt: question, completion: answer}",
        keys=", columns: {prompt: qestion, completion: answer}",
    ),
    checked(
        "data.roles the other way round",
        "rows.jsonl",
        '{"messages": [{"role": "customer", "content": "a"}, {"role": "agent", "content": "b"}]}\n',
        "written the other way round: the role in your data comes first.*"
        "fix: write data.roles: {customer: user, agent: assistant}",
        keys=", roles: {user: customer, assistant: agent}",
    ),
    checked(
        "a role that nobody knows",
        "rows.jsonl",
        '{"messages": [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        "role 'customer' is unknown; if it is the user's, set data.roles: {customer: user}.*fix: ",
        status=1,
    ),
    checked(
        "questions without an answer",
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        "no assistant turn, so nothing to learn.*rows.jsonl line 1.*fix: correct them, let `finetune data check",
        status=1,
    ),
    checked(
        "pairs for training on preferences",
        "rows.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "not done here.*fix: to train on the chosen answers alone, set data.columns: {completion: chosen}",
    ),
    Mistake(
        "a folder without data",
        {"rows/read.me": "hello", "recipe.yaml": recipe("{train: ./rows}")},
        "finetune data check recipe.yaml",
        "the folder holds no data files.*fix: name a folder with data files",
    ),
    Mistake(
        "a data file that is not there",
        {"rows.jsonl": ROW, "recipe.yaml": recipe("{train: ./row.jsonl}")},
        "finetune data check recipe.yaml",
        "there is no data file 'row.jsonl'.*what is there: rows.jsonl.*fix: check the path",
    ),
]

MISTAKES = [*DATA]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_one_message_names_the_way_out(mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in mistake.files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.replace("MODEL", MODEL).encode())
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    program, *arguments = shlex.split(mistake.command.replace("MODEL", MODEL))
    assert program == "finetune"
    ran = run_finetune(*arguments)
    assert ran.status == mistake.status, ran.stderr
    said = ran.stdout + ran.stderr
    assert said.count("error: ") == 1, "one message"
    message = said[said.index("error: ") :]
    assert re.search(mistake.says, message, re.DOTALL), message
    assert "Traceback" not in said
    assert contents(tmp_path) == before
