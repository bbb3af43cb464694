"""The files of a run read back: every number where it was written, steps taken twice counted once, faults said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import OutputError
from finetune.router.history import DRIFT_METRICS, max_of, read_history, without_repeats
from finetune.router.metrics import LAYER_METRICS
from finetune.runfolder import RunFolder
from tests.router.study.runs import alarm, drift, metrics_of, tilted, window, write_json, write_lines, write_run


def test_every_number_is_where_it_was_written(tmp_path: Path):
    write_run(tmp_path, layers=5, experts=4, alarms=[alarm(20, 3, expert=1)])
    history = read_history(RunFolder(tmp_path))
    assert [each.step for each in history.train] == list(range(10, 110, 10))
    assert [each.step for each in history.held_out] == [0, 50, 100]
    assert [each.step for each in history.drift] == [0, 50, 100]
    assert (history.layers, history.experts, history.window_tokens) == (5, 4, 4096)
    load = tilted(4)
    for each in (*history.train, *history.held_out):
        assert each.load == [load(layer, each.step) for layer in range(5)]
        for name in LAYER_METRICS:
            want = [metrics_of(load(layer, each.step), step=each.step)[name] for layer in range(5)]
            assert each.layers[name] == want
    assert history.train[3].scalars["completion/max_vio_worst"] == 0.3
    assert history.drift[1].layers == {name: drift(5, 1.0)[f"router/drift/by_layer/{name}"] for name in DRIFT_METRICS}
    assert history.loss[0] == (10, 3.9)
    assert history.held_out_loss == [(0, 4.2), (50, pytest.approx(3.7)), (100, pytest.approx(3.2))]
    assert [(a.step, a.layer, a.expert, a.action) for a in history.alarms] == [(20, 3, 1, "warn")]
    assert history.texts[0].pieces == ["<s>", " one", " two", " three"]
    assert [history.texts[0].layers, len(history.texts)] == [[0, 2, 4], 2]


def test_the_band_follows_the_tokens_of_a_log(tmp_path: Path):
    write_run(tmp_path)
    base = read_history(RunFolder(tmp_path)).base
    assert base is not None
    value = metrics_of(tilted(8)(2, 0))["z_loss"]
    # 0.05 between windows of 1024 tokens; a quarter of the tokens scatters twice as much.
    assert base.band("z_loss", 2, 1024) == pytest.approx((value - 0.1, value + 0.1))
    assert base.band("z_loss", 2, 256) == pytest.approx((value - 0.2, value + 0.2))
    assert base.band("max_vio", 0, 64) == pytest.approx((0.0, 0.2 + 0.4))  # not below even
    assert base.band("load_entropy", 0, 1024)[1] == 1.0
    assert base.band("z_loss", 99, 1024) is None
    assert base.band("z_loss", 0, 0) is None


def test_steps_that_were_taken_again_count_once():
    lines = [
        {"step": 5, "loss": 1.0},
        {"step": 10, "loss": 2.0},
        {"step": 10, "eval_loss": 3.0},
        {"step": 15, "loss": 4.0},
        {"step": 10, "eval_loss": 5.0},  # resumed from step 10, which is evaluated again
        {"step": 15, "loss": 6.0},
        {"step": 20, "loss": 7.0},
        {"step": 20, "train_runtime": 1.0},
    ]
    kept = without_repeats(lines)
    assert kept == [lines[0], lines[1], lines[4], lines[5], lines[6], lines[7]]


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path):
    write_run(tmp_path, evaluations=(), base=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "loss": 2.0, "router/lay')
    assert read_history(RunFolder(tmp_path)).train[-1].step == 100


def test_what_is_not_there_is_empty(tmp_path: Path):
    write_run(tmp_path, router=False)
    history = read_history(RunFolder(tmp_path))
    assert not history.has_router
    assert (history.train, history.drift, history.base, history.alarms, history.texts) == ([], [], None, [], [])
    assert len(history.loss) == 10


def test_detailed_scalars_stand_in_for_vectors(tmp_path: Path):
    line = {"step": 1, "loss": 1.0, "router/tokens": 8}
    line |= {f"router/layer_{at:02d}/load": [0.5, 0.5] for at in range(12)}
    line |= {f"router/layer_{at:02d}/max_vio": at / 10 for at in range(12)}
    line["router/layer_03/max_vio"] = None
    write_lines(tmp_path / "metrics.jsonl", [line])
    (window,) = read_history(RunFolder(tmp_path)).train
    assert len(window.load) == 12
    assert window.layers["max_vio"][:5] == [0.0, 0.1, 0.2, None, 0.4]
    assert window.worst("max_vio") == (11, 1.1)
    assert "z_loss" not in window.layers


def test_the_largest_of_what_is_known():
    assert max_of([None, 2.0, 3.0, 3.0]) == (2, 3.0)
    assert max_of([None]) is None


def test_files_that_cannot_be_understood_are_said(tmp_path: Path):
    write_run(tmp_path)
    run, base = RunFolder(tmp_path), tmp_path / "router" / "base.json"
    good = base.read_text()
    for text in ("{", "[]", '{"layers": []}'):
        base.write_text(text)
        with pytest.raises(OutputError, match="cannot be read") as caught:
            read_history(run)
        assert str(base) in str(caught.value)
        assert "the report then does without the base's band" in str(caught.value)
    base.write_text(good)
    texts = tmp_path / "router" / "texts.json"
    document = json.loads(texts.read_text())
    document["texts"][0]["tuned"][1].pop()
    write_json(texts, document)
    with pytest.raises(OutputError, match="not one expert a token and layer"):
        read_history(run)
    texts.unlink()
    (run.router / "alarms.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(OutputError, match="something else than metrics"):
        read_history(run)


def test_logs_of_another_model_are_refused(tmp_path: Path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 200, "loss": 1.0, **window(200, [[0.25] * 4] * 6)}) + "\n")
    with pytest.raises(OutputError, match="different sizes") as caught:
        read_history(RunFolder(tmp_path))
    assert "6x4, 6x8" in str(caught.value)
