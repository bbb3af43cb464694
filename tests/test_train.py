"""The whole training path on a random Mixtral: what is written, what resumes, what two processes compute."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapter.adapter import load
from finetune.console import Report
from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.errors import DeviceError
from finetune.evaluate.divergence import completion_loss
from finetune.memory.activations import ActivationPlan
from finetune.recipe.load import load_recipe
from finetune.run_files import held_out_loss
from finetune.train.run import out_of_memory_explained, prepare
from tests.conftest import REPOSITORY
from tests.running import run_finetune

Write = Callable[..., Path]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_leaves_what_it_names(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(
        training={"eval_strategy": "steps", "eval_steps": 8, "eval_on_start": True},
        router={"figures": True, "probe_tokens": 64},
    )
    ran = run_finetune("train", recipe, "--json")
    assert ran.status == 0, ran.stderr
    summary = ran.document
    assert summary["steps"] == 8
    assert summary["stopped_by"] is None
    assert summary["eval_loss_last"] < summary["eval_loss_first"] < math.log(32000) + 0.5
    run = tmp_path / "run"
    for name in ("run.json", "recipe.yaml", "census.json", "metrics.jsonl", "summary.json"):
        assert (run / name).is_file(), name
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json"):
        assert (run / "adapter" / name).is_file(), name
    assert len(summary["figures"]) == 5
    for figure in summary["figures"]:
        assert Path(figure).read_bytes().startswith(b"\x89PNG")
    # What the routers did is there for a report.
    assert json.loads((run / "router" / "base.json").read_text())["probe"]["tokens"] == 64
    reported = run_finetune("router", "report", run, "--html", tmp_path / "router.html")
    assert reported.status == 0, reported.stderr
    assert (tmp_path / "router.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    about = json.loads((run / "run.json").read_text())
    assert about["packages"]["transformers"]
    assert "git" in about
    # r * (in + out) of q, k, v, o in two layers of hidden 64, kv width 32.
    assert summary["trainable_parameters"] == 2 * 16 * (128 + 96 + 96 + 128)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # The saved recipe is complete: it describes the same run again.
    shown = run_finetune("recipe", "show", run / "recipe.yaml", "--json").document["recipe"]
    assert shown == about["recipe"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "loss" in line)
    assert {"learning_rate", "num_tokens", "router/max_vio_worst", "router/layer_01/load"} <= set(step)
    # One figure of speed: the summary's is that of the lines, each weighted by its time, without the first.
    rates = [line["tokens_per_second"] for line in lines if "loss" in line]
    tokens = [line["num_tokens"] for line in lines if "loss" in line]
    counts = [after - before for before, after in itertools.pairwise(tokens)]
    seconds = [count / rate for count, rate in zip(counts, rates[1:], strict=True)]
    assert summary["tokens_per_second"] == pytest.approx(sum(counts) / sum(seconds), rel=1e-6)
    assert sum(step["router/layer_01/load"]) == pytest.approx(1.0, abs=1e-5)


def test_the_end_is_logged_and_its_adapter_has_our_card(
    write_recipe: Write, tmp_path: Path, small_mixtral: Path, conversations: Path
) -> None:
    """Also where the last step is between two logs."""
    training = {"max_steps": 5, "logging_steps": 3, "save_strategy": "steps", "save_steps": 5}
    ran = run_finetune("train", write_recipe(training=training))
    assert ran.status == 0, ran.stderr
    logged = losses(tmp_path / "run")
    assert list(logged) == [3, 5]
    mean = (3 * logged[3] + 2 * logged[5]) / 5
    done = " ".join(ran.stdout[ran.stdout.index("Done") :].split())
    assert (
        f"training loss (nats) │ {mean:.3f} over the run; first logged {logged[3]:.3f}, last {logged[5]:.3f} │" in done
    )
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for words in (
        "library_name: peft",
        "# run\n",
        "LoRA, rank 16, alpha 32",
        f"| training loss, mean of the run | {mean:.3f}",
    ):
        assert words in card
    for absent in ("finetune pull", "figures/", str(tmp_path), str(small_mixtral.parent), str(conversations.parent)):
        assert absent not in card
    assert [path.parent.name for path in (tmp_path / "run").rglob("README.md")] == ["adapter"]


@pytest.mark.slow
def test_batches_of_a_token_budget_train(write_recipe: Write, tmp_path: Path, conversations: Path) -> None:
    """As many steps as the data check says, and every example once."""
    recipe = write_recipe(
        data={"tokens_per_batch": 80}, training={"num_train_epochs": 1, "max_steps": -1, "logging_steps": 1}
    )
    ran = run_finetune("train", recipe, "--json")
    assert ran.status == 0, ran.stderr
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert ran.document["steps"] == about["schedule"]["steps"] == about["parts"][0]["batches"]["batches"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["num_tokens"] for line in lines if "num_tokens" in line) == about["parts"][0]["tokens"]


def test_same_seed_same_run_and_exact_resume(write_recipe: Write, tmp_path: Path) -> None:
    # The checkpoint lies between two logs: the second one also counts what came before it.
    training = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine", "logging_steps": 3}
    lora = {"lora": {"dropout": 0.1}}  # a random number every step: resume must restore the generators too
    whole = write_recipe("whole.yaml", training=training, trainable=lora, output={"dir": str(tmp_path / "whole")})
    assert run_finetune("train", whole).status == 0
    again = write_recipe("again.yaml", training=training, trainable=lora, output={"dir": str(tmp_path / "again")})
    assert run_finetune("train", again).status == 0
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "again") == expected

    # As if it had been killed after step 4, with a half-written checkpoint on top.
    run = tmp_path / "again"
    newest = run / "checkpoints" / "checkpoint-8"
    (newest / "trainer_state.json").unlink()
    resumed = run_finetune("train", again, "--resume")
    assert resumed.status == 0, resumed.stderr
    assert losses(run) == expected
    ends = [json.loads((path / "summary.json").read_text())["train_loss"] for path in (tmp_path / "whole", run)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
    for name in ("adapter/adapter_model.safetensors",):
        a, b = load_file(tmp_path / "whole" / name), load_file(run / name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_non_moe_trains_saves_and_resumes(write_recipe: Write, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "quantization": {"attention": "16bit"},
        "trainable": {"method": "non_moe"},
        "training": {"save_strategy": "steps", "save_steps": 4, "learning_rate": 5e-4},
    }
    recipe = write_recipe(**sections)
    ran = run_finetune("train", recipe, "--json")
    assert ran.status == 0, ran.stderr
    run = tmp_path / "run"
    expected = losses(run)
    assert expected[8] < expected[1]
    tuned = load_file(run / "adapter" / "non_moe.safetensors")
    assert not any("experts" in name or "mlp.gate" in name for name in tuned)
    assert ran.document["trainable_parameters"] == sum(tensor.numel() for tensor in tuned.values())
    (run / "checkpoints" / "checkpoint-8" / "optimizer.pt").write_bytes(b"cut off")
    resumed = run_finetune("train", recipe, "--resume")
    assert resumed.status == 0
    assert "checkpoint-8 is damaged: optimizer.pt is truncated or corrupt: File is not a zip file\n" in resumed.stdout
    assert f"Resuming {run}: checkpoint-4\n" in resumed.stdout
    assert losses(run) == expected


TINY = sorted((REPOSITORY / "recipes" / "tiny-mixtral").glob("*.yaml"))
COLLAPSING = REPOSITORY / "recipes" / "tiny-mixtral" / "collapsing-router.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in TINY if path != COLLAPSING], ids=lambda p: p.stem)
def test_tiny_recipes_train(recipe: Path, tmp_path: Path) -> None:
    """Each for a few steps on the bundled model and data; held-out loss falls already."""
    settings = {"output.dir": tmp_path / "run", "training.max_steps": 4, "model.device": "cpu"}
    settings |= {"data.max_rows": 64, "data.max_eval_rows": 8, "training.lr_scheduler_type": "constant"}
    settings |= {"router.figures": "false", "router.probe_tokens": 256}  # for the test's time
    ran = run_finetune("train", recipe, "--json", *(f"--set={key}={value}" for key, value in settings.items()))
    assert ran.status == 0, ran.stderr
    # Measured: 4.39 -> 4.17 (LoRA), 4.35 -> 3.97 (non-MoE).
    assert ran.document["eval_loss_last"] < ran.document["eval_loss_first"] - 0.05


def test_the_collapsing_recipe_ruins_its_routers(tmp_path: Path) -> None:
    settings = {"output.dir": tmp_path / "run", "training.max_steps": 8, "model.device": "cpu", "data.max_rows": 200}
    settings |= {"training.eval_strategy": "no", "training.eval_on_start": "false", "router.probe_tokens": 512}
    settings["router.figures"] = "false"
    ran = run_finetune("train", COLLAPSING, *(f"--set={key}={value}" for key, value in settings.items()))
    assert ran.status == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    first, last = logged[0], logged[-1]
    # Measured, steps 1-2 and 7-8: MaxVio 1.1 and 2.4, token entropy 1.15 and 0.38, dead experts 0 and 8 of 48.
    assert last["router/dead_experts"] >= 3
    assert last["router/max_vio_worst"] > 1.8 > first["router/max_vio_worst"]
    assert last["router/token_entropy_mean"] < 0.5 * first["router/token_entropy_mean"]
    # Within fewer than the recipe's 20 steps the alarms go off, and are told.
    alarms = [json.loads(line) for line in (tmp_path / "run" / "router" / "alarms.jsonl").read_text().splitlines()]
    assert {"dead_expert", "entropy_collapse"} <= {alarm["alarm"] for alarm in alarms}
    assert f"warn   router, step {alarms[0]['step']}: {alarms[0]['message']}" in ran.stderr


def test_held_out_loss_is_a_mean_over_tokens(write_recipe: Write, tmp_path: Path, small_mixtral: Path) -> None:
    """Answers of unequal length in batches of two; against the merged model, row by row."""
    rows = tmp_path / "unequal.jsonl"
    answers = ["One.", "A much longer answer than the other one, on and on and on. " * 3] * 3
    lines = [
        {"messages": [{"role": "user", "content": f"Tell me {i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "per_device_eval_batch_size": 4}
    recipe = write_recipe(data={"eval": str(rows)}, training={**evaluation, "max_length": 256})
    ran = run_finetune("train", recipe, "--json")
    assert ran.status == 0, ran.stderr
    live = load(str(tmp_path / "run" / "adapter"), device="cpu")
    expected, _ = completion_loss(
        live.model, encode_source(Reading(Source(str(rows))), live.tokenizer, Supervision()).dataset, live.device
    )
    assert ran.document["eval_loss_last"] == pytest.approx(expected, rel=1e-5)
    # Nothing was evaluated before the first step, so nothing is said of it.
    assert ran.document["eval_loss_first"] is None
    assert f"held-out completion loss (nats) │ {expected:.3f} after │" in " ".join(ran.stderr.split())


def test_only_evaluations_that_were_made_are_told() -> None:
    def told(first: float | None, last: float | None, step: int | None) -> str | None:
        return held_out_loss({"steps": 8, "eval_loss_first": first, "eval_loss_last": last, "eval_step_last": step})

    assert told(5.4134, 4.2, 8) == "5.413 before training, 4.200 after"
    assert told(None, 4.2, 8) == "4.200 after"
    assert told(None, 4.2, 6) == "4.200 after step 6"
    assert told(5.4134, None, None) == "5.413 before training"
    assert told(None, None, None) is None
    # Summaries of earlier versions took the first evaluation for one before training.
    assert held_out_loss({"steps": 8, "eval_loss_first": 5.0, "eval_loss_last": 5.0}) == "5.000 after"


def test_auxiliary_loss_stands_apart(write_recipe: Write, tmp_path: Path) -> None:
    off = write_recipe("off.yaml", output={"dir": str(tmp_path / "off")}, training={"max_steps": 1})
    on = write_recipe(
        "on.yaml",
        output={"dir": str(tmp_path / "on")},
        training={"max_steps": 1, "gradient_accumulation_steps": 1},
        router={"aux": "train", "balance_coef": 0.5},
    )
    assert run_finetune("train", off).status == 0
    assert run_finetune("train", on).status == 0
    without, with_aux = ((json.loads((tmp_path / name / "metrics.jsonl").open().readline())) for name in ("off", "on"))
    assert "router/aux/balance" not in without
    assert with_aux["router/aux/balance"] == pytest.approx(with_aux["router/balance_loss_mean"], rel=1e-4)
    # The same first step: `loss` must not contain half a unit of auxiliary loss. Five digits are what TRL logs.
    assert with_aux["loss"] == pytest.approx(without["loss"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention_lora", "non_moe"])
def test_the_plan_is_shown_applied_and_changes_no_loss(write_recipe: Write, tmp_path: Path, method: str) -> None:
    sections: dict[str, Any] = {"trainable": {"method": method}}
    if method == "non_moe":
        sections["quantization"] = {"attention": "16bit"}
    found = {}
    for word, kept in (("none", 2), ("full", 0), ("auto", 2)):
        training = {"max_steps": 2, "gradient_checkpointing": word}
        recipe = write_recipe(f"{word}.yaml", training=training, output={"dir": str(tmp_path / word)}, **sections)
        ran = run_finetune("train", recipe)
        assert ran.status == 0, ran.stderr
        assert f"activations: {kept} of 2 layers keep the gate_up output, {kept} keep attention\n" in ran.stdout
        found[word] = losses(tmp_path / word)
    assert found["none"] == found["full"] == found["auto"]


def test_the_trainer_follows_the_plan_and_the_backend(write_recipe: Write, tmp_path: Path) -> None:
    path = write_recipe(model={"experts_backend": "loop"}, training={"gradient_checkpointing": "full"})
    ready = prepare(load_recipe(path), Report(as_json=True))
    assert ready.trainer.plan == ActivationPlan.full(2)
    assert not ready.trainer.args.gradient_checkpointing
    layers = ready.trainer.model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, True]
    assert [(layer.mlp.experts.backend, layer.mlp.experts.keep_gate_up) for layer in layers] == [("loop", False)] * 2


def test_the_grouped_backend_is_refused_on_a_cpu(write_recipe: Write) -> None:
    ran = run_finetune("train", write_recipe(model={"experts_backend": "grouped"}))
    assert ran.status == 2
    assert (
        "the grouped backend of the experts does not run in float32 on cpu\n  where: model.experts_backend"
        in ran.stderr
    )
    assert "fix: set model.experts_backend=auto" in ran.stderr


@pytest.mark.parametrize("packing", [False, True])
def test_packing_and_padding_train(write_recipe: Write, tmp_path: Path, packing: bool) -> None:
    recipe = write_recipe(training={"packing": packing, "max_steps": 2})
    ran = run_finetune("train", recipe)
    assert ran.status == 0, ran.stderr
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())


def test_running_out_of_memory_names_what_to_change(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe())
    with pytest.raises(DeviceError) as caught, out_of_memory_explained(recipe):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.75 GiB. GPU 0 has a total capacity of 79 GiB"
        )
    text = str(caught.value)
    assert "Tried to allocate 1.75 GiB" in text
    for key in ("training.gradient_checkpointing=auto", "memory.budget_gib", "per_device_train_batch_size"):
        assert key in text


@pytest.mark.slow
def test_two_processes_compute_the_same(write_recipe: Write, tmp_path: Path) -> None:
    """Two CPU processes of micro-batch 2 see the same data and losses as one of micro-batch 4."""
    training = {"max_steps": 3, "dataloader_drop_last": True, "disable_tqdm": "<absent>"}
    one = write_recipe("one.yaml", training=training, output={"dir": str(tmp_path / "one")})
    assert run_finetune("train", one).status == 0
    two = write_recipe(
        "two.yaml", training={**training, "per_device_train_batch_size": 2}, output={"dir": str(tmp_path / "two")}
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    done = subprocess.run(
        [*command, "--main_process_port", "0", "scripts/train.py", str(two), "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3  # one document, from the main process alone
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    # Measured: 2e-6 relative, from sums in another order.
    assert found == pytest.approx(expected, rel=1e-4)
    loads = [
        next(line for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line)
        for name in ("one", "two")
    ]
    assert loads[0]["router/layer_00/load"] == loads[1]["router/layer_00/load"]


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_every_module_trains_in_every_step(write_recipe: Write) -> None:
    """The trainer spares what upstream does anew before each step, and an evaluation between steps undoes it."""
    path = write_recipe(training={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2})
    ready = prepare(load_recipe(path), Report(as_json=True))
    modes: list[set[bool]] = []
    decoder = ready.trainer.model.get_base_model().model
    decoder.register_forward_pre_hook(lambda *_: modes.append({m.training for m in ready.trainer.model.modules()}))
    ready.trainer.train()
    trained, evaluated = {True}, {False}
    assert modes.count(trained) == 4
    assert modes.index(evaluated) == 2, "two steps, then an evaluation"
    assert [mode for mode in modes if mode not in (trained, evaluated)] == []
    assert ready.trainer.state.total_flos > 0

    # An evaluation under data parallelism is of the model inside, and what wraps it does not hear of it.
    trainer = ready.trainer
    wrapper = WrappedModel(trainer.model)
    trainer.model.eval()
    assert wrapper.training
    trainer.training_step(wrapper, next(iter(trainer.get_train_dataloader())))
    assert modes[-1] == trained


class WrappedModel(torch.nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)
