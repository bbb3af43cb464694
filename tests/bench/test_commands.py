"""The bench commands, end to end on a CPU: what they print, what they refuse. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.__main__ import app as bench
from finetune.bench.peer import PEERS, measure_peer
from tests.running import refused, run_finetune

Write = Callable[..., Path]


@pytest.mark.parametrize("method", ["attention_lora", "non_moe"])
def test_train(method: str, write_recipe: Write, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    recipe = write_recipe(trainable={"method": method}, quantization={"attention": "16bit"})
    options = ["--batch", "2", "--length", "32", "--steps", "2", "--out", out]
    ran = run_finetune("bench", "train", recipe, "--random-weights", *options)
    assert ran.status == 0, ran.stderr
    *table, line = ran.stdout.splitlines()
    document = json.loads(line)
    assert json.loads(out.read_text()) == document
    for words in ("tokens/s", "trainer", "bare", "model TFLOP/s", "estimated"):
        assert words in "\n".join(table)
    assert document["bench"] == "train"
    assert (document["batch"], document["length"], document["steps"]) == (2, 32, 2)
    assert document["tokens_per_step"] == 2 * 32
    assert len(document["trainer"]["losses"]) == 3 + 2 + 1
    assert len(document["bare"]["losses"]) == 2
    for path in ("trainer", "bare"):
        speed = document[path]
        assert speed["tokens_per_second"] == pytest.approx(64 / speed["seconds_per_step"], rel=1e-2)
        flops = speed["tokens_per_second"] * document["model_flops_per_token"]
        assert speed["tflops"] == pytest.approx(flops / 1e12, rel=1e-2)
    assert document["memory"]["estimate_bytes"] > 0
    assert document["packages"]["torch"]
    if not torch.cuda.is_available():
        assert document["device"] == "cpu"
        assert document["rates"] is document["families"] is document["memory"]["peak"] is None
    # Nothing is left where the recipe would have written.
    assert not (tmp_path / "run").exists()


def test_the_bare_step_repeats_the_trainers_first_loss(write_recipe: Write) -> None:
    """With a learning rate of zero, the same batches give the same losses to the digit."""
    ran = run_finetune(
        *("bench", "train", write_recipe(), "--random-weights", "--json"),
        *("--batch", "2", "--length", "32", "--steps", "2", "--set", "training.learning_rate=0.0"),
    )
    assert ran.status == 0, ran.stderr
    assert ran.document["bare"]["losses"] == ran.document["trainer"]["losses"][3:5]


def test_json_is_the_only_output(write_recipe: Write) -> None:
    recipe = write_recipe()
    ran = run_finetune(
        *("bench", "train", recipe, "--json", "--batch", "1", "--length", "64", "--steps", "1"),
        *("--set", "trainable.lora.r=4"),
    )
    assert ran.status == 0, ran.stderr
    assert ran.document["random_weights"] is False
    assert ran.document["overrides"] == ["trainable.lora.r=4"]


@pytest.mark.slow
def test_peers_on_a_cpu(small_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel is installed or played to be; without a GPU it cannot even be imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(PEERS, "liger", ())
    monkeypatch.setitem(PEERS, "unsloth", ("no_such_package",))
    ran = run_finetune(
        *("peers", "--shape", small_mixtral, "--json"),
        *("--batch", "1", "--length", "8", "--steps", "1", "--layers", "1"),
        app=bench,
    )
    assert ran.status == 0, ran.stderr
    document = ran.document
    assert (document["layers"], document["scaled_to_layers"]) == (1, 2)
    rows = {peer["peer"]: peer for peer in document["peers"]}
    assert list(rows) == list(PEERS)
    measured = rows["parametrization"]
    assert measured["status"] == "measured", measured["status"]
    assert measured["layers"] == 1
    assert measured["tokens_per_second"] == pytest.approx(8 / measured["seconds_per_step"], rel=1e-2)
    assert rows["liger"]["status"] == "needs a GPU"
    assert rows["unsloth"]["status"] == "not installed: no_such_package"


def test_a_peer_learns_with_its_experts_in_4_bits(small_mixtral: Path) -> None:
    result = measure_peer("parametrization", small_mixtral, batch=2, length=8, steps=4)
    first, last = result["losses"]
    assert last < first
    assert result["layers"] == 2


def test_kernels(small_mixtral: Path) -> None:
    ran = run_finetune("kernels", "--shape", small_mixtral, "--tokens", "3", "--tokens", "16", "--json", app=bench)
    assert ran.status == 0, ran.stderr
    names = {kernel["kernel"] for kernel in ran.document["kernels"]}
    assert {"dequantize NF4", "gather", "swiglu forward", "swiglu backward", "combine"} <= names
    assert all(kernel["bytes_per_second"] > 0 for kernel in ran.document["kernels"])
    cases = ran.document["experts"]
    assert {(case["backend"], case["tokens"], case["routing"]) for case in cases} == {
        (backend, tokens, routing)
        for backend in ("grouped", "loop")
        for tokens in (3, 16)
        for routing in ("even", "skewed")
    }
    assert all(case["status"] == "measured" for case in cases if case["backend"] == "loop")


def test_refusals(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe()
    train = ("bench", "train", recipe, "--random-weights")
    refused(tmp_path, *train, "--set", "training.max_steps=3", says=("a bench sets `training.max_steps`", "--steps"))
    refused(tmp_path, *train, "--out", tmp_path / "no" / "file", says=("cannot be written", "--out"))
    refused(tmp_path, *train, "--set", "training.learning_rat=1", says=("unknown key `learning_rat`",))
    refused(tmp_path, "peers", "--shape", tmp_path, says=("config.json",), app=bench)
    refused(tmp_path, "kernels", "--shape", tmp_path / "nowhere", says=("config.json",), app=bench)


@pytest.mark.slow
def test_experts(small_mixtral: Path, conversations: Path) -> None:
    """Fewer bits, more error, by the numbers of the storage; a checkpoint that is quantized is refused."""
    ran = run_finetune("experts", small_mixtral, "--data", conversations, "--rows", "3", "--device", "cpu", app=bench)
    assert ran.status == 0, ran.stderr
    *table, line = ran.stdout.splitlines()
    document = json.loads(line)
    for words in ("16-bit", "nf4", "hqq3", "hqq2", "KL"):
        assert words in "\n".join(table)
    rows = document["storages"]
    assert [row["storage"] for row in rows] == ["nf4", "hqq3", "hqq2"]
    assert [row["bits_per_weight"] for row in rows[1:]] == [3.5, 2.5]
    errors = [row["weight_error"] for row in rows]
    assert errors == sorted(errors)
    assert all(row["kl"] > 0 and 0 <= row["greedy_agreement"] <= 1 for row in rows)
    assert document["rows"] == 3


def test_experts_of_a_quantized_checkpoint(small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    ran = run_finetune("quantize", small_mixtral, "--experts", "hqq2", "--attention", "16bit", "--output",
                       tmp_path / "two", "--device", "cpu")  # fmt: skip
    assert ran.status == 0, ran.stderr
    assert "hqq2" in ran.stdout
    says = ("there is nothing to compare with: the checkpoint is quantized", "allowed: a checkpoint in 16 bits")
    refused(tmp_path, "experts", tmp_path / "two", "--data", conversations, says=says, app=bench)
