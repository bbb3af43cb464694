"""What earlier code saved still loads, and answers as it did: `tests/recorded/`, made once by scripts/make_recorded.py.

A test that fails here says that a user's own folder no longer works. Making the folders again would hide that.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.adapter.adapter import is_adapter, load
from finetune.moe.census import hash_experts
from finetune.moe.load import LoadedModel
from tests.running import run_finetune

RECORDED = Path(__file__).parent / "recorded"
BASE = RECORDED / "base"
MADE_IN = "/tmp/moe-qlora/tests/recorded"
TRUTH: dict[str, Any] = json.loads((RECORDED / "truth.json").read_text("utf-8"))
ADAPTERS = [name for name in TRUTH["folders"] if is_adapter(RECORDED / name)]


def open_recorded(folder: Path) -> LoadedModel:
    # Where the base was then, nobody has it.
    return load(str(folder), base_path=str(BASE) if is_adapter(folder) else None, device="cpu", dtype="float32")


def recorded_logits(name: str) -> torch.Tensor:
    """float32 [4 positions, vocabulary]"""
    with safe_open(RECORDED / "truth.safetensors", framework="pt") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("name", TRUTH["folders"])
def test_it_answers_as_it_did(name: str) -> None:
    truth = TRUTH["folders"][name]
    loaded = open_recorded(RECORDED / name)
    chat = [{"role": "user", "content": TRUTH["asked"]}]
    assert loaded.tokenizer.apply_chat_template(chat, return_dict=False) == truth["prompt"]
    tokens = torch.tensor([truth["prompt"] + truth["greedy"]])
    with torch.no_grad():
        logits = loaded.model(input_ids=tokens, use_cache=False).logits[0]
    first = len(truth["prompt"]) - 1
    assert logits[first:-1].argmax(-1).tolist() == truth["greedy"]
    # Bit-equal where they were made; another CPU adds in another order. Logits reach 6.
    torch.testing.assert_close(logits[-4:], recorded_logits(name), atol=2e-5, rtol=0)
    if "experts_sha256" in truth:
        assert hash_experts(loaded.model) == truth["experts_sha256"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_commands_read_it(name: str) -> None:
    folder = RECORDED / name
    inspected = run_finetune("adapter", "inspect", folder, "--json", "--base", BASE)
    assert inspected.status == 0, inspected.stderr
    answered = run_finetune(
        *("generate", folder, "--base", BASE, "--prompt", TRUTH["asked"], "--max-new-tokens", 8),
        *("--device", "cpu", "--json"),
    )
    assert answered.status == 0, answered.stderr
    words = open_recorded(folder).tokenizer.decode(TRUTH["folders"][name]["greedy"], skip_special_tokens=False)
    assert answered.document["answers"][0]["text"] == words.split("</s>")[0].strip()


@pytest.mark.parametrize("name", ["nf4", "bf16"])
def test_the_run_merges_to_the_recorded_weights(name: str, tmp_path: Path) -> None:
    how = ("--rows", 0) if name == "nf4" else ("--format", "bf16", "--onto", "original")
    merged = run_finetune(
        *("merge", RECORDED / "run" / "adapter", "--base", BASE, "--output", tmp_path / name, "--device", "cpu"), *how
    )
    assert merged.status == 0, merged.stderr
    was = load_file(RECORDED / name / "model.safetensors")
    now = load_file(tmp_path / name / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in now.items()} == {key: tensor.dtype for key, tensor in was.items()}
    # The attention adds s B A to W, in an order that is the CPU's; the experts keep their bytes.
    for key, tensor in was.items():
        exact = "experts" in key or "norm" in key
        torch.testing.assert_close(now[key], tensor, atol=0 if exact else 1e-4, rtol=0 if exact else 2**-7)
    if name == "nf4":
        assert hash_experts(open_recorded(tmp_path / name).model) == TRUTH["folders"]["nf4"]["experts_sha256"]


def test_a_process_without_the_toolkit_refuses_a_merged_folder() -> None:
    program = f"""if True:
        import sys
        from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
        bnb = BitsAndBytesConfig(load_in_4bit=True)
        for loader, config in ((AutoModelForCausalLM, None), (AutoModel, None), (AutoModelForCausalLM, bnb)):
            try:
                loader.from_pretrained({str(RECORDED / "nf4")!r}, quantization_config=config)
            except ValueError as error:
                print(error)
        assert "finetune" not in sys.modules
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    refusals = done.stdout.splitlines()
    assert len(refusals) == 3
    assert all("these weights are for moe-qlora: run `import finetune.quant`" in refusal for refusal in refusals)


def test_the_words_in_a_merged_folder_still_hold() -> None:
    says = json.loads((RECORDED / "nf4" / "config.json").read_text("utf-8"))["transformers_weights"]
    assert "run `import finetune.quant` before from_pretrained" in says
    importlib.import_module("finetune.quant")
    model = AutoModelForCausalLM.from_pretrained(RECORDED / "nf4", dtype=torch.float32)
    truth = TRUTH["folders"]["nf4"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([truth["prompt"] + truth["greedy"]])).logits[0]
    torch.testing.assert_close(logits[-4:], recorded_logits("nf4"), atol=2e-5, rtol=0)


def test_evaluate_compares_the_run_with_its_merge() -> None:
    ran = run_finetune(
        *("evaluate", RECORDED / "run" / "adapter", "--base", BASE, "--compare", RECORDED / "nf4"),
        *("--data", RECORDED / "rows.jsonl", "--max-rows", 2, "--device", "cpu", "--json"),
    )
    assert ran.status == 0, ran.stderr


def test_the_runs_checkpoint_trains_the_next_steps_to_the_recorded_losses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RECORDED / "run", run)
    was = losses(run)
    # A run goes on with its own recipe; what it names lies elsewhere here than where it was made.
    for file in [*run.rglob("*.json"), run / "recipe.yaml"]:
        file.write_text(file.read_text("utf-8").replace(MADE_IN, str(RECORDED)), encoding="utf-8")
    ran = run_finetune("train", run / "recipe.yaml", "--resume", "--set", f"output.dir={run}")
    assert ran.status == 0, ran.stderr
    assert "checkpoint-2" in ran.stdout
    assert list(was) == [1, 2, 3, 4]
    assert losses(run) == pytest.approx(was, abs=2e-5)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for key, tensor in load_file(RECORDED / "run" / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapter[key], tensor, atol=1e-4, rtol=0)


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
