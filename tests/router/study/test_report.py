"""The verdict on a run, from folders written by hand, and what the command says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.errors import OutputError
from finetune.router.study.report import RouterReport, read_report
from tests.router.study.runs import alarm, collapsing, tilted, write_json, write_lines, write_run


def report_of(folder: Path, **options: Any) -> RouterReport:
    return read_report(write_run(folder, **options))


def test_a_healthy_run(tmp_path: Path):
    made = report_of(tmp_path, layers=6, experts=8)
    assert made.verdict.word == "intact"
    assert made.verdict.headline == "The routing is intact"
    # The load does not change; the deepest layer's first expert gets 1 + 0.2 * 1.1 even shares.
    assert "no expert died" in made.verdict.sentence
    assert "MaxVio is 0.22 (0.22 in the base)" in made.verdict.sentence
    # Overlap at step 100: strength 2, so 1 - 0.1 (1 + layer / 6), mean over six layers.
    assert f"{1 - 0.1 * (1 + 2.5 / 6):.1%} of the experts chosen" in made.verdict.sentence
    assert (made.comparison.same_tokens, made.comparison.with_base) == (True, True)
    assert made.missing == []
    assert (made.verdict.level, made.verdict.advice.partition(";")[0]) == ("fine", "nothing")
    document = made.to_dict()
    assert document["compared"]["max_vio_worst"] == [pytest.approx(0.22), pytest.approx(0.22)]
    assert document["compared"]["dead_experts"] == [0, 0]
    assert (document["steps"], document["layers"], document["experts"]) == (100, 6, 8)
    json.dumps(document, allow_nan=False)


def test_a_dead_expert_breaks_it(tmp_path: Path):
    made = report_of(tmp_path, layers=32, load=collapsing(8, 17, 100))
    assert (made.verdict.word, made.verdict.level) == ("broken", "error")
    share = 1 - 0.2 * (1 + 0.02 * 17)
    assert made.verdict.sentence == (
        f"1 expert died: expert 7 of layer 17 gets 0.00 of an even share, and got {share:.2f} in the base."
    )
    assert made.to_dict()["compared"]["dead_experts"] == [0, 1]


def test_what_to_do_about_a_broken_routing_depends_on_what_trained(tmp_path: Path):
    for name, trainable, router, says in (
        ("frozen", {}, {}, "a tenth of `training.learning_rate`"),
        (
            "trained",
            {"router": True},
            {},
            "`trainable.router: false`, or with a tenth of `training.learning_rate` and `router.aux: train`, which "
            "balances the load",
        ),
        (
            "balanced",
            {"router": True, "router_learning_rate": 0.1},
            {"aux": "train"},
            "`trainable.router: false`, or with a tenth of `trainable.router_learning_rate`",
        ),
    ):
        made = report_of(tmp_path / name, load=collapsing(8, 1, 100), recipe={"trainable": trainable, "router": router})
        assert made.verdict.advice == f"do not use this adapter; train again with {says}"


def test_an_expert_that_the_base_did_not_use_either_did_not_die(tmp_path: Path):
    unused = lambda layer, step: [0.25, 0.25, 0.25, 0.24, 0.01]  # noqa: E731
    assert report_of(tmp_path, experts=5, load=unused).verdict.word == "intact"


def test_few_tokens_kill_no_expert(tmp_path: Path):
    write_run(tmp_path, load=collapsing(8, 1, 100))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "metrics.jsonl", [line | {"eval_router/tokens": 100} for line in lines])
    assert read_report(tmp_path).verdict.word != "broken"


def test_a_collapsed_load_and_choice_break_it(tmp_path: Path):
    both = lambda layer, step: [0.125] * 8 if step == 0 or layer else [0.5, 0.3, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02]  # noqa: E731
    made = report_of(tmp_path / "load", load=both)
    assert made.verdict.word == "broken"
    assert "The spread of the load collapsed in 1 layer, to 47%" in made.verdict.sentence
    write_run(tmp_path / "choice")
    lines = [json.loads(line) for line in (tmp_path / "choice/metrics.jsonl").read_text().splitlines()]
    lines[-1]["eval_router/by_layer/token_entropy"][4] = 0.3
    write_lines(tmp_path / "choice/metrics.jsonl", lines)
    made = read_report(tmp_path / "choice")
    assert (
        made.verdict.sentence
        == "The entropy of a token's choice collapsed in 1 layer, to 25% of the base's in layer 4."
    )


def test_a_load_that_moved_far(tmp_path: Path):
    write_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["router/drift/by_layer/load_change"][3] = 0.81
    write_lines(tmp_path / "metrics.jsonl", lines)
    made = read_report(tmp_path)
    assert (made.verdict.word, made.verdict.level) == ("moved", "notice")  # no alarm, no warning
    assert made.verdict.advice == (
        f"keep the run if other text still works (`finetune evaluate {tmp_path}/adapter --compare base --data FILE`); "
        "if not, halve `training.learning_rate`"
    )
    assert made.verdict.sentence.startswith(
        "On the same tokens the load of an expert in layer 3 changed by 0.81 of an even share, 20 times what chance "
        "shows. No expert died, the worst layer's MaxVio is 0.22 (0.22 in the base), and 85.8% of"
    )
    lines[-1]["router/drift/by_layer/load_change"][3] = 0.49  # twelve times chance, below half an even share
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert read_report(tmp_path).verdict.word == "intact"
    lines[-1]["router/drift/by_layer/overlap"][1] = 0.61  # (0.61 - 0.25) / 0.75 is below a half
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert "Layer 1 makes only 61% of the base's choices, 25% by chance." in read_report(tmp_path).verdict.sentence


def test_a_change_that_chance_explains_is_none(tmp_path: Path):
    write_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["router/drift/by_layer/load_change"][3] = 0.81
    write_lines(tmp_path / "metrics.jsonl", lines)
    base = json.loads((tmp_path / "router/base.json").read_text())
    write_json(tmp_path / "router/base.json", base | {"noise_floor": 0.1})
    assert read_report(tmp_path).verdict.word == "intact"


def test_alarms_count(tmp_path: Path):
    made = report_of(tmp_path / "warned", alarms=[alarm(20, 1), alarm(30, 1)])
    assert (made.verdict.word, made.verdict.level) == ("moved", "warning")
    assert made.verdict.sentence.startswith("2 alarms went off on the way, and the end is quiet again. No expert died,")
    made = report_of(tmp_path / "stopped", alarms=[alarm(100, 1, action="stop")])
    assert made.verdict.word == "broken"
    assert "an alarm stopped the run: layer 1: something happened" in made.verdict.sentence.lower()
    # Resumed and trained on: the summary of the end knows better.
    write_json(tmp_path / "stopped/summary.json", {"stopped_by": None})
    assert read_report(tmp_path / "stopped").verdict.word == "moved"


def test_without_the_same_tokens_the_probe_is_the_base(tmp_path: Path):
    made = report_of(tmp_path, evaluations=(50,))
    assert made.comparison.before_name == "base, held-out data"
    assert made.comparison.after_name == "training, step 100"
    assert not made.comparison.same_tokens
    assert [each.fix for each in made.missing] == ["`training.eval_on_start: true`"]


def test_an_interrupted_run_without_a_base(tmp_path: Path):
    recipe = {"router": {"probe_tokens": 0, "alarms": {"action": "off"}}}
    made = report_of(tmp_path, steps=(2, 4), evaluations=(), base=False, recipe=recipe)
    assert (made.verdict.word, made.verdict.level) == ("unknown", "notice")
    assert made.verdict.advice == f"measure it now: `finetune router drift {tmp_path}/adapter`"
    assert (made.comparison.before_name, made.comparison.after_name) == ("training, step 2", "training, step 4")
    fixes = {each.what: each.fix for each in made.missing}
    assert fixes["drift from the base on the same tokens"] == "`router.probe_tokens: 4096`"
    assert fixes["alarms"] == "`router.alarms.action: warn`"
    assert "training.eval_strategy" in fixes["the routing of held-out tokens"]
    assert report_of(tmp_path / "one", steps=(2,), evaluations=(), base=False).comparison is None


def test_before_the_first_step(tmp_path: Path):
    made = report_of(tmp_path, steps=(), evaluations=(0,))
    assert (made.verdict.word, made.verdict.headline) == ("unknown", "Nothing has trained yet")


def refused(folder: Path) -> str:
    with pytest.raises(OutputError) as caught:
        read_report(folder)
    return str(caught.value)


def test_what_is_no_run_is_said(tmp_path: Path):
    said = refused(tmp_path / "nowhere")
    assert "there is no run in this folder" in said
    assert str(tmp_path / "nowhere") in said
    assert "name the `output.dir` of a run" in said
    write_run(tmp_path / "run", router=False, recipe={"router": {"log": False}})
    said = refused(tmp_path / "run")
    assert "this run has no router metrics" in said
    assert "train with `router.log: true`" in said
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "has logged nothing yet" in refused(tmp_path / "run")
    for text in ("{", "[]", "{}"):
        (tmp_path / "run" / "run.json").write_text(text)
        assert "a file of this run cannot be read" in refused(tmp_path / "run")


def test_the_command(tmp_path: Path):
    run, page, figures = write_run(tmp_path / "run", alarms=[alarm(20, 1)]), tmp_path / "to/page.html", tmp_path / "png"
    called = CliRunner().invoke(app, ["router", "report", str(run), "--html", str(page), "--figures", str(figures)])
    assert called.exit_code == 0, called.output
    assert "Fine-tuning moved the routing" in called.output
    assert "What to do: keep the run if other text still works" in called.output
    assert "alarm at step 20: layer 1: something happened" in called.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in figures.iterdir()} == {
        "training.png",
        "router_load.png",
        "router_load_over_training.png",
        "router_layers.png",
        "router_drift.png",
    }
    called = CliRunner().invoke(app, ["router", "report", str(run), "--json"])
    document = json.loads(called.stdout)
    assert document["verdict"]["word"] == "moved"
    assert document["drift"]["step"] == 100
    assert len(document["alarms"]) == 1


def test_the_command_refuses_whole(tmp_path: Path):
    page = tmp_path / "page.html"
    called = CliRunner().invoke(app, ["router", "report", str(tmp_path / "none"), "--html", str(page)])
    assert called.exit_code == 2
    assert "error: there is no run in this folder" in called.output
    assert not page.exists()
    run = write_run(tmp_path / "run")
    page.mkdir()
    called = CliRunner().invoke(app, ["router", "report", str(run), "--html", str(page)])
    assert called.exit_code == 2
    assert "the report cannot be written" in called.output
    assert not list(page.iterdir())
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_loads_of_the_helper_are_shares():
    for load in (tilted(8), collapsing(8, 0, 10)):
        assert sum(load(0, 5)) == pytest.approx(1.0)
