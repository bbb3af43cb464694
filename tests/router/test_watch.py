"""A run beside its base, inside TRL's trainer: what is measured before the first step, what drifts, what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.jsonl import read_metrics
from finetune.router.alarms import AlarmRules, RouterAlarms
from finetune.router.callback import RouterCallback
from finetune.router.capture import RouterCapture
from finetune.router.metrics import LAYER_METRICS, layer_metrics, noise_floor
from finetune.router.reference import RouterReference, probe_rows
from finetune.router.watch import RouterWatch
from tests.router.routing_models import FAMILIES, LAYERS, build_model, random_rows, sums_of
from tests.router.test_callback import TRAIN_ROWS, dataset, trainer_for, with_lora

EXPERTS, TOP_K = FAMILIES["mixtral"]
PROBE = random_rows([20, 7, 13, 9, 30, 4], seed=5)


def logprobs_of(model: nn.Module, rows: list[list[int]]) -> list[list[list[float]]]:
    """[layer][token][expert] from the logits that transformers returns."""
    out: list[list[list[float]]] = [[] for _ in range(LAYERS)]
    for row in rows:
        with torch.no_grad():
            said = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for layer, logits in enumerate(said):
            out[layer] += logits.double().log_softmax(-1).tolist()
    return out


def watched(
    router: RouterCallback, folder: Path, *, rules: AlarmRules | None = None, every: int | None = None, **settings: Any
) -> tuple[RouterWatch, list[str]]:
    """Gives the trainer's router callback a watch over `PROBE`."""
    told: list[str] = []
    router.watch = RouterWatch(
        folder,
        RouterReference(router.capture, PROBE, name="probe"),
        None if rules is None else RouterAlarms(rules, experts=EXPERTS, top_k=TOP_K),
        action=settings.get("action", "warn"),
        tell=told.append,
        pieces=lambda ids: [f"w{i}" for i in ids],
        main=True,
        every=every,
    )
    return router.watch, told


def test_measuring_the_base_does_not_freeze_the_adapter() -> None:
    """FSDP2 decides by the first forward pass, once, what trains; the probe may be that one."""
    model = with_lora()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen: list[set[str]] = []
    model.register_forward_pre_hook(lambda *_: seen.append({n for n, p in model.named_parameters() if p.requires_grad}))
    RouterReference(RouterCapture(model, num_experts=EXPERTS, top_k=TOP_K), PROBE, name="probe").measure_base()
    assert trains
    assert seen == [trains] * len(PROBE)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains


def test_probe_rows_are_documents() -> None:
    packed = [
        {"input_ids": [1, 5, 6, 1, 7], "seq_lengths": [3, 2]},
        {"input_ids": [1, 8, 9, 10], "seq_lengths": [4]},
        {"input_ids": [1], "seq_lengths": [1]},
    ]
    assert probe_rows(packed, 100, layers=2, experts=8) == [[1, 5, 6], [1, 7], [1, 8, 9, 10], [1]]
    assert probe_rows(packed, 7, layers=2, experts=8) == [[1, 5, 6], [1, 7], [1, 8]]
    assert probe_rows([{"input_ids": [1, 2]}, {"input_ids": [3]}], 100, layers=2, experts=8) == [[1, 2], [3]]
    assert probe_rows(packed, 0, layers=2, experts=8) == []
    # 48 layers of 128 experts in float32 are 24 KiB a token, of which 64 MiB hold 2,730.
    assert len(probe_rows([{"input_ids": [1] * 9999}], 4096, layers=48, experts=128)[0]) == 2730


@pytest.mark.parametrize("lora", [True, False])
def test_the_base_is_measured_before_the_first_step_and_drift_at_evaluations(tmp_path: Path, lora: bool) -> None:
    model = with_lora() if lora else build_model("mixtral")
    before = sums_of(
        logprobs_of(build_model("mixtral"), PROBE), TOP_K, [index for index, row in enumerate(PROBE) for _ in row]
    )
    trainer, router, recorder = trainer_for(
        model,
        tmp_path,
        learning_rate=5e-2,
        gradient_accumulation_steps=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    watched(router, tmp_path / "router")
    trainer.train()

    base = json.loads((tmp_path / "router" / "base.json").read_text())
    tokens = sum(map(len, PROBE))
    assert base["probe"] == {"name": "probe", "rows": len(PROBE), "tokens": tokens}
    assert base["noise_floor"] == noise_floor(tokens, EXPERTS, TOP_K)
    for got, want in zip(base["layers"], layer_metrics(before), strict=True):
        assert got["load"] == pytest.approx(want.load)
        for name in LAYER_METRICS:
            # The base is read as log-probabilities, whose logsumexp is 0; the capture reads logits.
            if name != "z_loss":
                assert got[name] == pytest.approx(getattr(want, name), rel=1e-4, abs=1e-6), name
    assert all(len(values) == LAYERS for values in base["spread"].values())

    evaluations = [(step, logs, vectors) for step, logs, vectors in recorder.lines if "eval_loss" in logs]
    assert [step for step, _, _ in evaluations] == [0, 2, 4]
    at_start, at_end = evaluations[0], evaluations[-1]
    assert at_start[1]["router/drift/overlap_mean"] == 1.0
    assert at_start[1]["router/drift/kl_worst"] == pytest.approx(0.0, abs=1e-12)
    assert all("router/drift/kl_mean" not in logs for _, logs, _ in recorder.lines if "loss" in logs)

    # By hand, at the end: the trained model against the base.
    trained = logprobs_of(trainer.model.eval(), PROBE)
    original = logprobs_of(build_model("mixtral"), PROBE)
    for layer in range(LAYERS):
        pairs = list(zip(original[layer], trained[layer], strict=True))
        best = [[set(sorted(range(EXPERTS), key=lambda e, p=p: -p[e])[:TOP_K]) for p in pair] for pair in pairs]
        overlap = sum(len(a & b) / TOP_K for a, b in best) / tokens
        kl = sum(sum(torch.tensor(p).exp() * (torch.tensor(p) - torch.tensor(q))) for p, q in pairs) / tokens
        assert at_end[2]["router/drift/by_layer/overlap"][layer] == pytest.approx(overlap)
        assert at_end[2]["router/drift/by_layer/kl"][layer] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert at_end[1]["router/drift/kl_mean"] > 0

    texts = json.loads((tmp_path / "router" / "texts.json").read_text())
    assert texts["layers"] == [0, 1, 2]
    assert texts["texts"][1]["pieces"] == [f"w{token}" for token in PROBE[1]]
    first = len(PROBE[0])
    assert texts["texts"][1]["base"][2] == [
        max(range(EXPERTS), key=lambda e, p=p: p[e]) for p in original[2][first : first + len(PROBE[1])]
    ]
    # The probe is nobody's training or evaluation token.
    assert router.totals["train"].tokens == sum(map(len, TRAIN_ROWS))
    assert at_start[1]["eval_router/tokens"] == 20


def test_reading_the_probe_leaves_training_as_it_is(tmp_path: Path) -> None:
    losses = []
    for every in (None, 1):
        trainer, router, recorder = trainer_for(
            with_lora(), tmp_path / str(every), learning_rate=5e-2, logging_steps=1, eval_strategy="no"
        )
        if every is not None:
            watched(router, tmp_path / "router", every=every)
        trainer.train()
        losses.append([logs["loss"] for _, logs, _ in recorder.lines if "loss" in logs])
        drifts = [logs for _, logs, _ in recorder.lines if "router/drift/kl_mean" in logs]
        assert len(drifts) == (0 if every is None else 2)
    assert losses[0] == losses[1]


def test_without_evaluation_the_probe_is_read_every_ten_steps_at_most(tmp_path: Path) -> None:
    trainer, router, recorder = trainer_for(
        with_lora(), tmp_path, gradient_accumulation_steps=1, max_steps=20, logging_steps=20, eval_strategy="no"
    )
    watched(router, tmp_path / "router")
    trainer.train()
    assert [step for step, logs, _ in recorder.lines if "router/drift/kl_mean" in logs] == [10, 20]


def kill_expert(model: nn.Module, layer: int, expert: int) -> None:
    """From now on the router of one layer never chooses it."""
    gate = model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.gate")

    def hook(_gate: nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, _ = output
        logits = logits.clone()
        logits[:, expert] = -30.0
        return logits, scores, logits.topk(TOP_K).indices

    gate.register_forward_hook(hook, prepend=True)  # before the capture's


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_expert_that_dies_is_told_and_may_stop_the_run(tmp_path: Path, action: str) -> None:
    model = with_lora()
    rows = random_rows([64] * 24)
    trainer, router, _ = trainer_for(
        model,
        tmp_path,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=8,
        max_steps=6,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
    )
    trainer.train_dataset = dataset(rows)
    watch, told = watched(router, tmp_path / "router", rules=AlarmRules(load_change=None), every=100, action=action)
    measured = watch.reference.measure_base  # type: ignore[union-attr]

    def then_kill() -> Any:
        base = measured()
        kill_expert(model, 1, 0)
        return base

    watch.reference.measure_base = then_kill  # type: ignore[union-attr, method-assign]
    trainer.train()

    (alarm,) = read_metrics(tmp_path / "router" / "alarms.jsonl")
    assert (alarm["step"], alarm["alarm"], alarm["layer"], alarm["expert"]) == (1, "dead_expert", 1, 0)
    assert alarm["action"] == action
    assert told == [f"router, step 1: {alarm['message']}"]
    if action == "warn":
        assert trainer.state.global_step == 6
        assert router.stopped_by is None
    else:
        assert trainer.state.global_step == 1
        assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()
        assert router.stopped_by == alarm["message"]


def test_a_resumed_run_keeps_its_base_and_drops_later_alarms(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 5e-2,
    }
    trainer, router, _ = trainer_for(with_lora(), tmp_path, **settings)
    watched(router, tmp_path / "router", every=1)
    trainer.train()
    base = (tmp_path / "router" / "base.json").read_text()
    whole = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "router/drift/kl_mean" in line]
    (tmp_path / "router" / "alarms.jsonl").write_text('{"step": 2, "alarm": "x"}\n{"step": 4, "alarm": "y"}\n')

    resumed, router, lines = trainer_for(with_lora(), tmp_path, **settings)
    watch, _ = watched(router, tmp_path / "router", every=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "router" / "base.json").read_text() == base
    assert [line["alarm"] for line in read_metrics(watch.alarms_file)] == ["x"]
    again = [(step, logs["router/drift/kl_mean"]) for step, logs, _ in lines.lines if "router/drift/kl_mean" in logs]
    assert [step for step, _ in again] == [3, 4]
    for (_, value), line in zip(again, whole[2:], strict=True):
        assert value == pytest.approx(line["router/drift/kl_mean"], rel=1e-5)


def test_a_base_that_is_kept_damaged_is_told_and_measured_again(tmp_path: Path) -> None:
    _, router, _ = trainer_for(with_lora(), tmp_path, eval_strategy="no")
    watch, _ = watched(router, tmp_path / "router", rules=AlarmRules(), every=1)
    router.capture.attach()
    watch.begin(0)
    assert watch.reference is not None
    described, kept = tmp_path / "router" / "base.json", tmp_path / "router" / "reference.safetensors"
    whole, tensors = json.loads(described.read_text()), kept.read_bytes()
    # A text without neighbours repeats nothing: NaN, which JSON writes as null.
    lone = {**whole, "layers": [{**layer, "repeat_first": None} for layer in whole["layers"]]}
    fewer = {**whole, "layers": whole["layers"][:-1]}
    for text, reference, says in (
        (json.dumps(lone), tensors, None),
        ('{"probe": ', tensors, "base.json is not valid JSON"),
        ("[]", tensors, "base.json does not hold a JSON object"),
        ('{"probe": {}}', tensors, "base.json does not fit: `top_k` is missing"),
        (json.dumps({**whole, "layers": [{"load": "x"}]}), tensors, "`layers[0].load` cannot be 'x'"),
        (json.dumps(fewer), tensors, "reference.safetensors is of another model"),
        (json.dumps(whole), tensors[:-1], "reference.safetensors is truncated"),
    ):
        described.write_text(text)
        kept.write_bytes(reference)
        again, told = watched(router, tmp_path / "router", rules=AlarmRules(), every=1)
        again.begin(2)
        assert again.reference is not None
        assert (again.reference.base == watch.reference.base) == (says is not None)
        assert json.loads(described.read_text()) == (whole if says else lone)
        assert len(told) == (says is not None)
        if says:
            assert f"{tmp_path / 'router'}: what was kept of the base's routing is damaged: " in told[0]
            assert says in told[0]


def test_a_model_that_trained_in_full_has_its_base_in_the_files_only(tmp_path: Path) -> None:
    trainer, router, _ = trainer_for(build_model("mixtral"), tmp_path, eval_strategy="no")
    watch, _ = watched(router, tmp_path / "router", every=1)
    router.capture.attach()
    watch.begin(0)
    with torch.no_grad():
        for layer in trainer.model.model.layers:
            layer.mlp.gate.weight.mul_(-1)
    drift = watch.drift()
    assert drift is not None

    again, told = watched(router, tmp_path / "router", every=1)
    again.begin(2)
    assert again.drift() == drift
    assert told == []
    (tmp_path / "router" / "reference.safetensors").unlink()
    lost, told = watched(router, tmp_path / "router", every=1)
    lost.begin(2)
    assert lost.drift() is None
    assert told == ["the routing of the base was not kept, so this run is no longer compared with it"]
