"""The quickstart: held-out requests stay apart, right answers are counted, and without SmolLM2 it says so."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.running import run_finetune

RECIPE = REPOSITORY / "recipes" / "smollm2-moe"
TINY = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
FALLBACK = "SmolLM2 could not be downloaded, so the bundled tiny-mixtral is tuned instead"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_requests", RECIPE / "data" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conversations(name: str) -> list[list[dict[str, str]]]:
    lines = (RECIPE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_the_data_is_what_the_script_makes(make: ModuleType) -> None:
    for name, rows in make.files().items():
        assert [row["messages"] for row in rows] == conversations(name)


def test_held_out_requests_share_no_template_and_no_slot_with_train(make: ModuleType) -> None:
    assert not set(make.TRAIN_TEMPLATES) & set(make.HELD_OUT_TEMPLATES)
    trained = " ".join(message["content"] for messages in conversations("train") for message in messages[1:])
    for word in f"{make.HELD_OUT_SLOTS.names},{make.HELD_OUT_SLOTS.products}".split(","):
        assert word not in trained
    assert not set(make.TRAIN_SLOTS.orders) & set(make.HELD_OUT_SLOTS.orders)
    asked = {messages[1]["content"] for messages in conversations("heldout")}
    assert len(asked) == len(conversations("heldout"))


def test_the_answer_is_in_the_request() -> None:
    for name in ("train", "heldout"):
        for _, request, answer in conversations(name):
            found = re.fullmatch(r"Please help (.+) with order (\d+), the (.+)\.", answer["content"])
            assert found is not None
            assert all(part in request["content"] for part in found.groups())


def test_right_answers_are_counted(tmp_path: Path) -> None:
    """Against `finetune generate`: two answers as it gives them, one of them with a letter changed."""
    prompts = ["Who are you?", "What is AI?"]
    said: dict[str, Any] = run_finetune(
        "generate", TINY, "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 8, "--json"
    ).document
    answers = [one["text"] for one in said["answers"]]
    expected = [answers[0], answers[1] + "x"]
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in zip(prompts, expected, strict=True)
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "scripts/exact_match.py", f"tiny={TINY}", "--data", str(data), "--max-new-tokens", "8"]
    done = subprocess.run([*command, "--json", str(out)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["answers"] == {"tiny": answers}
    assert document["right"] == {"tiny": 1}
    assert "1 of 2" in done.stdout
    assert "50%" in done.stdout


@pytest.mark.parametrize("reachable", [True, False])
def test_without_smollm2_the_tiny_model_is_tuned_and_it_is_said(tmp_path: Path, reachable: bool) -> None:
    """With an environment that only writes down what it is asked to do."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "_venv.sh").write_text("ensure_venv() { :; }\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    fails = "" if reachable else "[[ $1 != scripts/upcycle_smollm2.py ]] || exit 1\n"
    makes = '[[ $1 != scripts/upcycle_smollm2.py ]] || mkdir -p "$2"\n'
    for name in ("python", "finetune"):
        pretender = tmp_path / ".venv" / "bin" / name
        pretender.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>log\n{fails}{makes}')
        pretender.chmod(0o755)
    done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (FALLBACK in done.stdout) is not reachable
    upcycle, train, merge, ask = (tmp_path / "log").read_text().splitlines()
    assert upcycle == "python scripts/upcycle_smollm2.py outputs/smollm2-moe-4.unfinished --experts 4"
    folder = "smollm2-moe" if reachable else "tiny-mixtral"
    assert train.startswith(f"finetune train recipes/{folder}/qlora-attention.yaml ")
    assert merge.startswith("finetune merge outputs/quickstart/run/adapter --output outputs/quickstart/merged")
    assert ask.startswith("python scripts/exact_match.py" if reachable else "finetune generate")
    assert (tmp_path / "outputs" / "smollm2-moe-4").is_dir() is reachable


def test_the_pages_show_the_recorded_count() -> None:
    recorded = json.loads((REPOSITORY / "bench" / "results" / "cpu" / "quickstart.json").read_text(encoding="utf-8"))
    expected = [messages[-1]["content"] for messages in conversations("heldout")]
    assert recorded["expected"] == expected
    right = {name: sum(map(str.__eq__, given, expected)) for name, given in recorded["answers"].items()}
    assert right == recorded["right"]
    assert right["base"] <= 0.2 * len(expected)
    assert right["tuned"] > right["base"]
    page = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for text in (page, (REPOSITORY / "README.md").read_text(encoding="utf-8")):
        for name, count in right.items():
            assert re.search(rf"{name} +[│|] +{count} of {len(expected)} [│|] +{count / len(expected):.0%}", text)
