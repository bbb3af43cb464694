"""The callback inside TRL's SFTTrainer, against a count of the same rows made without it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune.jsonl import JsonlCallback, read_metrics
from finetune.router.callback import RouterCallback
from finetune.router.capture import RouterCapture
from finetune.router.metrics import LAYER_METRICS, RouterSums, layer_metrics
from finetune.train.progress import ProgressCallback
from tests.router.routing_models import (
    FAMILIES,
    LAYERS,
    assert_counts,
    assert_sums,
    brute_force_count,
    brute_force_sums,
    build_model,
    random_rows,
)

EXPERTS, TOP_K = FAMILIES["mixtral"]
TRAIN_ROWS = random_rows([9, 4, 7, 2, 5, 6, 8, 3])
EVAL_ROWS = random_rows([5, 12, 3], seed=1)


class Recorder(TrainerCallback):
    """A writer: keeps what it is given at each log."""

    def __init__(self, router: RouterCallback):
        self.router, self.lines = router, []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append((state.global_step, dict(logs), dict(self.router.vectors())))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )


def with_lora() -> torch.nn.Module:
    """The tiny Mixtral with a fresh adapter, which is the identity."""
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    return get_peft_model(build_model("mixtral"), config)


def dataset(rows: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})


def trainer_for(
    model: torch.nn.Module, folder: Path, *extra: TrainerCallback, **settings: Any
) -> tuple[SFTTrainer, RouterCallback, Recorder]:
    capture = RouterCapture(model, num_experts=EXPERTS, top_k=TOP_K)
    router = RouterCallback(capture, detailed=True)
    recorder = Recorder(router)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "router_aux_loss_coef": 0.0,
        "disable_tqdm": True,
        "bf16": False,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**defaults, **settings}),
        train_dataset=dataset(TRAIN_ROWS),
        eval_dataset=dataset(EVAL_ROWS),
        processing_class=tokenizer(),
        callbacks=[
            router,
            ProgressCallback(),
            recorder,
            JsonlCallback(folder / "metrics.jsonl", extra=[router.vectors]),
            *extra,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, router, recorder


def truth(rows: list[list[int]]) -> RouterSums:
    return brute_force_sums(build_model("mixtral"), rows, TOP_K)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("peft", [False, True])
def test_one_epoch_of_sft(
    tmp_path: Path, reentrant: bool | None, peft: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_lora() if peft else build_model("mixtral")
    checkpointing = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, router, recorder = trainer_for(
        model, tmp_path, gradient_checkpointing=reentrant is not None, **checkpointing
    )
    trainer.train()

    assert_sums(router.totals["train"], truth(TRAIN_ROWS))
    assert_sums(router.totals["eval"], truth(EVAL_ROWS))

    (_, train_logs, train_loads), (_, eval_logs, eval_loads), (_, last_logs, last_loads) = recorder.lines
    for logs, loads, prefix, rows in (
        (train_logs, train_loads, "", TRAIN_ROWS),
        (eval_logs, eval_loads, "eval_", EVAL_ROWS),
    ):
        want = layer_metrics(truth(rows))
        assert logs[f"{prefix}router/tokens"] == sum(map(len, rows))
        assert logs[f"{prefix}router/max_vio_worst"] == pytest.approx(max(m.max_vio for m in want))
        assert logs[f"{prefix}router/prompt/tokens"] == len(rows)  # the first token of each is not supervised
        assert logs[f"{prefix}router/completion/tokens"] == sum(map(len, rows)) - len(rows)
        for layer, metrics in enumerate(want):
            for name in LAYER_METRICS:
                # A few units in float32's last place: at a z-loss of 23, that of torch 2.11 was off by 2.1e-6.
                value = pytest.approx(getattr(metrics, name), rel=3e-7, abs=2e-6)
                assert logs[f"{prefix}router/layer_{layer:02d}/{name}"] == value, name
                assert loads[f"{prefix}router/by_layer/{name}"][layer] == value, name
            assert loads[f"{prefix}router/layer_{layer:02d}/load"] == pytest.approx(metrics.load, abs=1e-6)
        assert len(loads) == LAYERS + len(LAYER_METRICS)
        # Scalar loggers see scalars only, and no name of the other mode.
        router_names = [name for name in logs if "router/" in name]
        assert all(isinstance(logs[name], (int, float)) for name in router_names)
        assert all(name.startswith(f"{prefix}router/") for name in router_names)
    # Everything was logged, so the closing line of training has nothing to add.
    assert "train_runtime" in last_logs
    assert not last_loads
    assert not any("router/" in name for name in last_logs)
    assert not router.capture.attached

    # What the writers after it saw is in the file, and standard output stayed free.
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 2, 2]
    for line, (_, logs, loads) in zip(lines, recorder.lines, strict=True):
        assert {name: line[name] for name in logs} == logs
        assert {name: line[name] for name in loads} == loads
    assert lines[0]["tokens_per_second"] > 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "train  step 2/2  loss " in err
    assert "eval   step 2/2  loss " in err
    assert err.count("MaxVio") == 2


def test_steps_after_the_last_logging_step_are_in_the_closing_log(tmp_path: Path) -> None:
    trainer, router, recorder = trainer_for(
        build_model("mixtral"), tmp_path, gradient_accumulation_steps=1, logging_steps=3, eval_strategy="no"
    )
    trainer.train()
    (step, logs, _), (last_step, last, _) = recorder.lines
    assert (step, last_step) == (3, 4)
    assert "train_runtime" in last
    assert logs["router/tokens"] + last["router/tokens"] == sum(map(len, TRAIN_ROWS)) == router.totals["train"].tokens


def test_several_evaluation_sets_keep_their_names(tmp_path: Path) -> None:
    model = build_model("mixtral")
    trainer, router, _ = trainer_for(model, tmp_path, eval_strategy="no")
    with router.capture:
        metrics = trainer.evaluate({"code": dataset(EVAL_ROWS[:2]), "prose": dataset(EVAL_ROWS[2:])})
    assert metrics["eval_code_router/tokens"] == 17
    assert metrics["eval_prose_router/tokens"] == 3
    # An evaluation with the capture off says nothing about the router.
    assert not any("router" in name for name in trainer.evaluate())


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resume_counts_the_remaining_steps(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 5e-2,
    }
    whole, _, whole_lines = trainer_for(with_lora(), tmp_path / "whole", **settings)
    whole.train()

    killed, _, _ = trainer_for(with_lora(), tmp_path / "killed", Stop(), **settings)
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    resumed, router, lines = trainer_for(with_lora(), tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)

    assert [step for step, _, _ in lines.lines] == [3, 4, 4]
    assert router.totals["train"].tokens == sum(logs["router/tokens"] for _, logs, _ in whole_lines.lines[2:4])
    for (step, logs, loads), (want_step, want_logs, want_loads) in zip(
        lines.lines[:2], whole_lines.lines[2:4], strict=True
    ):
        assert (step, loads) == (want_step, want_loads)
        for name in want_logs:
            if name.startswith("router/"):
                assert logs[name] == pytest.approx(want_logs[name], rel=1e-5), name

    # The killed and resumed run left the same lines as the uninterrupted one, each step once.
    whole_file, resumed_file = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "killed"))
    assert [line["step"] for line in resumed_file] == [1, 2, 3, 4, 4]
    for line, want_line in zip(resumed_file[:4], whole_file[:4], strict=True):
        assert line["loss"] == pytest.approx(want_line["loss"], rel=1e-6)
        assert line["router/layer_00/load"] == want_line["router/layer_00/load"]
    assert resumed_file[4]["seconds"] > resumed_file[1]["seconds"]


@pytest.mark.parametrize("multiple", [None, 16])
def test_packing_counts_documents_as_if_alone(tmp_path: Path, multiple: int | None) -> None:
    trainer, router, _ = trainer_for(
        build_model("mixtral"),
        tmp_path,
        packing=True,
        max_length=12,
        pad_to_multiple_of=multiple,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        eval_strategy="no",
    )
    trainer.train()
    want = brute_force_count(build_model("mixtral"), TRAIN_ROWS, EXPERTS, TOP_K)
    assert_counts(router.totals["train"], want)
