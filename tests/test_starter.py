"""`finetune init`: its recipe passes the commands that follow, its choices follow the data and the card."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from finetune.starter import Plan, Wish, covered, held_out, paced
from tests.conftest import REPOSITORY
from tests.running import refused, run_finetune

MODEL = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
SHAPE = REPOSITORY / "recipes" / "mixtral-8x7b" / "shape"
WISH = Wish("model", "data", {}, None, "cpu")


def question(index: int) -> tuple[str, str]:
    return f"What is {index} of the old mill?", f"It is number {index}, " + "and so on " * (index % 30)


def write_csv(path: Path, header: tuple[str, str] = ("prompt", "completion")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(question(index) for index in range(60))])
    return path


def write_lines(path: Path) -> Path:
    rows = ([("user", asked), ("assistant", said)] for asked, said in map(question, range(60)))
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_alpaca(path: Path) -> Path:
    rows = [{"instruction": asked, "input": "", "output": said} for asked, said in map(question, range(60))]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("data", ["own data.csv", "own.jsonl", "own.json"])
def test_the_recipe_passes_what_follows(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write = {".csv": write_csv, ".jsonl": write_lines, ".json": write_alpaca}[Path(data).suffix]
    write(tmp_path / data)
    ran = run_finetune("init", "--model", MODEL, "--data", data, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["recipe"] == "recipe.yaml"
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert f"./{data}" in text
    assert str(MODEL) in text
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train == str(tmp_path / data)
    assert recipe.data.eval_rows == 6
    assert run_finetune("preflight", "recipe.yaml").status == 0
    checked = run_finetune("data", "check", "recipe.yaml", "--json")
    assert checked.status == 0
    assert checked.document["faults"] == []
    # No conversation is cut, and an epoch has updates enough.
    assert checked.document["parts"][0]["too_long"]["truncated"] == 0
    assert checked.document["schedule"]["steps"] >= 20


def test_what_is_not_named_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO(f"{MODEL}\n{write_lines(tmp_path / 'own.jsonl')}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    ran = run_finetune("init", "--output", tmp_path / "mine.yaml")
    assert ran.status == 0, ran.stderr
    assert f"train:            finetune train {tmp_path / 'mine.yaml'}" in ran.stdout
    assert load_recipe(tmp_path / "mine.yaml").model.path == str(MODEL)


def test_named_columns_and_another_card(tmp_path: Path) -> None:
    data, file = write_csv(tmp_path / "own.csv", ("ask me", "tell me")), tmp_path / "mine.yaml"
    words = ("init", "--model", MODEL, "--data", data, "--output", file, "--gpu-gib", 24)
    ran = run_finetune(*words, "--prompt-column", "ask me", "--answer-column", "tell me")
    assert ran.status == 0, ran.stderr
    assert f"finetune preflight {file} --gpu-gib 24" in ran.stdout
    recipe = load_recipe(file)
    assert recipe.data.columns == {"prompt": "ask me", "completion": "tell me"}
    assert (recipe.training["bf16"], recipe.model.device) == (True, "auto")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, file = write_lines(tmp_path / "own.jsonl"), tmp_path / "mine.yaml"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    refused(tmp_path, "init", "--model", MODEL, "--output", file, says=("--data is missing", "give --data"))
    one = ("init", "--model", MODEL, "--data", data, "--output", file, "--prompt-column", "x")
    refused(tmp_path, *one, says=("named together", "give both"))
    small = ("init", "--model", MODEL, "--data", data, "--output", file, "--gpu-gib", 0.25)
    refused(tmp_path, *small, says=("does not fit: one row of 256 tokens", "256.0 MiB", "finetune recipe list"))
    file.write_text("mine\n", encoding="utf-8")
    taken = ("init", "--model", MODEL, "--data", data, "--output", file)
    refused(tmp_path, *taken, says=("there is a file already", "--output"))


def test_lengths_and_steps_follow_the_data() -> None:
    bins = [
        {"to": 300, "rows": 980},
        {"to": 600, "rows": 15},
        {"from": 600, "to": 901, "rows": 5},
    ]
    lengths = {"longest": 900, "histogram": bins}
    assert [covered(lengths, length) for length in (256, 512, 1024)] == [0, 0.98, 1]
    assert [held_out(rows) for rows in (3, 60, 100_000)] == [1, 6, 200]
    many = Plan(WISH, rows=50_000, tokens=20_000_000, hidden_size=4096, covered=1, held_out=200, length=1024)
    few = replace(many, rows=500, tokens=100_000, held_out=50)
    fewest = replace(many, rows=45, tokens=900, held_out=5)
    of = [paced(plan, 4) for plan in (many, few, fewest)]
    assert [(plan.packing, plan.micro_batch, plan.accumulation, plan.epochs) for plan in of] == [
        (True, 4, 2, 1),
        (True, 4, 1, 3),
        (False, 2, 1, 3),
    ]
