"""What a run will need and write, from its settings.

The plan is compared with its neighbours, which must not fit; the number of checkpoints is counted here by walking
through the steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from finetune.checkpoint.json_file import read_json
from finetune.console import Report
from finetune.console import gib as in_gib
from finetune.memory.activations import ActivationPlan
from finetune.memory.needs import disk_bytes, plan_of, preflight, require_fits, show_memory
from finetune.memory.run import GIB, Run
from finetune.memory.totals import MemoryEstimate, estimate
from finetune.moe.arch import MoeArch
from finetune.moe.fused_layers import wants_fused_layers
from finetune.moe.load import load_tokenizer
from finetune.recipe.load import load_recipe
from tests.conftest import REPOSITORY
from tests.running import refused, run_finetune

ROWS, BATCH = 100, 8  # 13 steps an epoch
WEIGHTS = 13_631_488 * 4  # LoRA of rank 16 on Mixtral 8x7B, float32
FUSED = wants_fused_layers("auto", torch.device("cuda"), "mixtral")
MIXTRAL = REPOSITORY / "recipes" / "mixtral-8x7b"


def classic(
    *overrides: str, gib: float | None = 80, device: str = "cuda", name: str = "qlora-attention"
) -> MemoryEstimate:
    settings = [f"model.path={MIXTRAL / 'shape'}", "model.dtype=bfloat16", *overrides]
    recipe = load_recipe(MIXTRAL / f"{name}-80gb.yaml", settings)
    return preflight(recipe, torch.device(device), device_bytes=None if gib is None else int(gib * GIB))


# ---- the activation plan --------------------------------------------------------------------------------------


def test_a_small_batch_keeps_everything_and_a_large_one_as_much_as_fits() -> None:
    assert plan_of(classic()) == ActivationPlan.none(32)
    large = classic("training.per_device_train_batch_size=8", "training.max_length=4096")
    assert large.fits
    assert 0 < large.keep_gate_up < 32
    assert large.total_bytes > 78 * GIB, "the room is used"


@pytest.mark.parametrize("name", ["qlora-attention", "freeze-experts"])
def test_no_plan_that_keeps_more_would_fit(name: str) -> None:
    batch = "training.per_device_train_batch_size=8"
    kept = -1
    for gib in (26, 27, 28, 30, 34, 42, 55, 60, 70, 80):
        found = classic(batch, f"memory.budget_gib={gib}", name=name)
        if not found.fits:
            assert plan_of(found) == ActivationPlan.full(32)
            assert kept == -1, "less fits into more"
            continue
        assert found.total_bytes <= gib * GIB
        assert found.keep_attention + found.keep_gate_up >= kept
        kept = found.keep_attention + found.keep_gate_up
        for more in ({"keep_attention": 1}, {"keep_gate_up": 1}):
            counts = {key: getattr(found, key) + more.get(key, 0) for key in ("keep_attention", "keep_gate_up")}
            if max(counts.values()) <= 32:
                assert bytes_of(batch, name=name, **counts) > gib * GIB
    assert kept == 64 or (name == "freeze-experts" and kept > 0)


def bytes_of(*overrides: str, name: str, **keep: int) -> int:
    recipe = load_recipe(MIXTRAL / f"{name}-80gb.yaml", [f"model.path={MIXTRAL / 'shape'}", *overrides])
    run = Run(
        MoeArch.from_config(read_json(MIXTRAL / "shape" / "config.json")),
        method=recipe.trainable.method,
        attention_storage=recipe.quantization.attention,
        micro_batch=recipe.training["per_device_train_batch_size"],
        seq_len=recipe.training["max_length"],
        fused_layers=FUSED,
        **keep,  # type: ignore[arg-type]
    )
    return estimate(run).total_bytes


def test_full_and_none_are_taken_at_their_word() -> None:
    for word, plan in (("full", ActivationPlan.full(32)), ("none", ActivationPlan.none(32))):
        for gib in (20, 80):
            assert plan_of(classic(f"training.gradient_checkpointing={word}", gib=gib)) == plan
    none = classic("training.gradient_checkpointing=none", "training.per_device_train_batch_size=16")
    assert not none.fits
    assert none.advice[0].startswith("set training.gradient_checkpointing: auto: ")
    auto = classic("training.per_device_train_batch_size=16")
    assert auto.fits
    assert (auto.largest_micro_batch or 0) > (none.largest_micro_batch or 0) > 0


def test_on_a_cpu_the_memory_of_the_machine_counts_and_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.memory.needs._host_bytes", lambda: 200 * GIB)
    free = classic(gib=None, device="cpu")
    assert plan_of(free) == ActivationPlan.none(32)
    assert (free.device_bytes, free.backend, free.fits) == (200 * GIB, "loop", True)
    tight = classic("memory.budget_gib=30", gib=None, device="cpu")
    assert tight.device_bytes == 30 * GIB
    assert 0 < tight.keep_gate_up < 32
    monkeypatch.setattr("finetune.memory.needs._host_bytes", lambda: 16 * GIB)
    small = classic(gib=None, device="cpu")
    assert not small.fits
    assert plan_of(small) == ActivationPlan.full(32)


def test_a_run_that_cannot_fit_is_refused_unless_it_is_forced(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the estimate's own numbers and advice; nothing is read or written."""
    monkeypatch.setattr("finetune.memory.needs._host_bytes", lambda: 3 * 2**20)
    recipe = write_recipe(training={"max_steps": 1, "per_device_train_batch_size": 64})
    estimated = run_finetune("preflight", recipe, "--json")
    assert estimated.status == 1
    document = estimated.document
    says = [
        f"the run does not fit: it needs {in_gib(document['total_bytes'])} and may use 3.0 MiB",
        *document["advice"],
        document["what_fits"],
    ]

    def reached(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.train.run.load_base", reached)
    ran = refused(tmp_path, "train", recipe, says=(*says, "where: memory of cpu", "with --force"))
    assert document["advice"]
    assert "set training.per_device_train_batch_size: " in ran.stderr
    # What a shard needs is not estimated.
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        require_fits(preflight(load_recipe(recipe), torch.device("cpu")), where="here")
    assert run_finetune("train", recipe, "--force").status == 130, "it went on to the weights"


def test_a_sharded_run_recomputes_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert plan_of(classic()) == ActivationPlan.full(32)


def test_a_budget_that_is_too_small_says_how_much_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    found = classic("memory.budget_gib=20")
    assert not found.fits
    assert found.device_bytes == 20 * GIB
    first = found.advice[0]
    assert first.startswith("set memory.budget_gib: ")
    assert first.endswith(" or more")
    enough = float(first.removeprefix("set memory.budget_gib: ").removesuffix(" or more"))
    assert classic(f"memory.budget_gib={enough}").fits
    assert not classic(f"memory.budget_gib={enough - 0.2}").fits
    # A larger budget is no way out on a GPU that is that small itself.
    assert not any("budget_gib" in line for line in classic("memory.budget_gib=20", gib=22).advice)
    show_memory(found, Report(as_json=False))
    shown = capsys.readouterr().out
    assert "activations: 0 of 32 layers keep the gate_up output, 0 keep attention" in shown
    assert f"to make it fit: {first}" in shown
    assert f"\n{found.what_fits}\n" in shown


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("qlora-attention", ["training.per_device_train_batch_size=16"]),
        (
            "qlora-attention",
            ["training.max_length=8192", "quantization.attention=16bit", "trainable.lora.use_dora=true"],
        ),
        ("qlora-attention", ["model.experts_backend=grouped", "trainable.lora.r=512", "trainable.lora.dropout=0.1"]),
        ("qlora-attention", ["training.gradient_checkpointing=none", "training.per_device_train_batch_size=12"]),
        ("freeze-experts", []),
        ("freeze-experts", ["training.max_length=4096", "trainable.router=true"]),
    ],
)
def test_what_fits_does(name: str, overrides: list[str]) -> None:
    """The overrides, given to preflight as they are printed, fit; without any one of them the run does not."""
    fitted = 0
    for gib in (24, 25, 28, 31.3, 36, 39.4, 44.4, 60, 79.1):
        found = classic(*overrides, name=name, gib=gib)
        if found.fits:
            assert (found.advice, found.overrides, found.what_fits) == ((), (), "")
            continue
        if not found.overrides:
            assert found.what_fits.startswith(f"nothing of this model fits into {gib:.2f} GiB; the least is ")
            assert fitted == 0, "more fits into more"
            continue
        fitted += 1
        assert all(f"--set {override} " in found.what_fits for override in found.overrides)
        changed = classic(*overrides, *found.overrides, name=name, gib=gib)
        assert changed.fits
        recipes = [
            load_recipe(MIXTRAL / f"{name}-80gb.yaml", [*overrides, *more]).training for more in ((), found.overrides)
        ]
        effective = [
            recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1) for recipe in recipes
        ]
        assert effective[0] == effective[1]
        assert found.overrides[0] in found.what_fits
    assert fitted


def test_what_fits_does_for_a_small_model_whose_logits_are_most_of_it() -> None:
    """There the share of supervised tokens counts, which differs from one micro-batch to another."""
    recipe = REPOSITORY / "recipes" / "tiny-mixtral" / "qlora-attention.yaml"
    for gib in (0.15, 0.25, 0.4, 0.8):
        overrides = ["training.per_device_train_batch_size=16", f"memory.budget_gib={gib}"]
        found = preflight(load_recipe(recipe, overrides), torch.device("cpu"))
        assert not found.fits
        changed = preflight(load_recipe(recipe, [*overrides, *found.overrides]), torch.device("cpu"))
        assert changed.fits == bool(found.overrides)
        assert found.largest_micro_batch == 0 or found.overrides


def test_the_least_of_a_model_is_what_nothing_undercuts() -> None:
    """Of a card that is a little smaller it says the same; on one that is as large, something fits."""
    least = float(classic(gib=20).what_fits.split("the least is ")[1].split(" GiB")[0])
    assert classic(gib=least - 0.02).overrides == ()
    assert classic(gib=least + 0.02).fits or classic(gib=least + 0.02).overrides


def test_the_budget_is_not_more_than_the_device() -> None:
    assert classic("memory.budget_gib=200").device_bytes == 80 * GIB


def test_the_loop_backend_needs_less() -> None:
    full = "training.gradient_checkpointing=full"
    grouped, loop = classic(full), classic(full, "model.experts_backend=loop")
    assert (grouped.backend, loop.backend) == ("grouped", "loop")
    assert loop.total_bytes < grouped.total_bytes


# ---- the supervised tokens ------------------------------------------------------------------------------------


def test_only_supervised_tokens_have_logits(tmp_path: Path) -> None:
    """Of a small model they are most of a step. A prompt of many tokens and a short answer, counted by hand."""
    tiny = REPOSITORY / "recipes" / "tiny-mixtral"
    turns = [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "yes"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))

    def estimated(train: Path) -> MemoryEstimate:
        settings = [f"data.train={train}", "training.max_length=1024", "model.dtype=bfloat16"]
        return preflight(load_recipe(tiny / "qlora-attention.yaml", settings), torch.device("cuda"), device_bytes=GIB)

    tokenizer = load_tokenizer(str(tiny / "model"))
    prompt = len(tokenizer.encode("[INST] " + turns[0]["content"]))
    assert prompt > 600
    # "yes" and </s> of about 610 tokens: hardly any logits; a file that is not there: all of them.
    few, all_of_them = estimated(rows), estimated(tmp_path / "missing.jsonl")
    tile = 2 * 2 * 1024 * 32768  # micro-batch 2, bfloat16
    saved = all_of_them.tensor_bytes - few.tensor_bytes
    assert 0.5 * tile < saved <= 1.1 * tile


# ---- the disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "saved_at"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": 12}, [5, 10, 12]),
        ({"save_strategy": "steps", "save_steps": 500, "max_steps": 12}, [12]),
        ({"save_strategy": "steps", "save_steps": 0.25, "num_train_epochs": 2}, [7, 14, 21, 26]),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, [13, 26, 39]),
        ({"save_strategy": "epoch", "num_train_epochs": 1.5}, [13, 20]),
        ({"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "save_total_limit": 2}, [1, 2, 3]),
        ({"save_strategy": "epoch", "num_train_epochs": 1, "save_total_limit": 2}, [13]),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 4, "max_steps": 12}, [4, 8, 12]),
        ({"save_strategy": "steps", "save_steps": 6, "max_steps": 12, "save_only_model": True}, [6, 12]),
    ],
)
def test_disk_is_counted_by_checkpoint(tmp_path: Path, training: dict[str, Any], saved_at: list[int]) -> None:
    arch = MoeArch.from_config(read_json(REPOSITORY / "recipes" / "mixtral-8x7b" / "shape" / "config.json"))
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        metric_for_best_model="loss",
        **training,
    )
    # AdamW keeps two more numbers a weight.
    checkpoint = WEIGHTS if training.get("save_only_model") else 3 * WEIGHTS
    needed = disk_bytes(estimate(Run(arch)), args, ROWS)
    beside = needed - len(saved_at) * checkpoint - WEIGHTS
    # Tokenizer and small files of each checkpoint and of the adapter; Mixtral's are 3.6 MB.
    assert 3.6e6 < beside / (len(saved_at) + 1) < 2e7
