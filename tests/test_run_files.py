"""The files of a run, damaged or of another release: one message, whatever is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import AdapterError, OutputError
from finetune.run_files import DataFile, FidelityFile, SummaryFile, recorded, recorded_recipe

RECIPE = {"model": {"path": "m"}, "data": {"train": "d"}, "output": {"dir": "o"}}


@pytest.mark.parametrize(
    ("schema", "content", "says"),
    [
        (SummaryFile, {"steps": "8"}, "`steps` cannot be '8', `stopped_by` is missing"),
        (DataFile, {"parts": []}, "`parts` cannot be a list"),
        (
            DataFile,
            {"parts": [{"sources": [{}], "examples": 1, "tokens": 1}]},
            "`parts[0].sources[0].where` is missing",
        ),
        (FidelityFile, {"fidelity": {"tokens": 1, "kl": "small"}}, "`fidelity.kl` cannot be 'small'"),
    ],
)
def test_a_file_that_does_not_say_what_it_should(tmp_path: Path, schema: type, content: object, says: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content))
    with pytest.raises(OutputError) as caught:
        recorded(file, schema)
    assert says in str(caught.value)
    assert "fix: restore the file as `finetune train` wrote it" in str(caught.value)


def test_the_recipe_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"recipe": RECIPE, "packages": {}}))
    assert recorded_recipe(file, kind=AdapterError, fix="x").model.path == "m"
    file.write_text(json.dumps({"recipe": {**RECIPE, "of_tomorrow": {}}, "packages": {}}))
    with pytest.raises(AdapterError, match=r"recipe is of another version of this toolkit\n.*of_tomorrow"):
        recorded_recipe(file, kind=AdapterError, fix="x")
    file.write_text("{}")
    with pytest.raises(AdapterError, match="`recipe` is missing"):
        recorded_recipe(file, kind=AdapterError, fix="x")
