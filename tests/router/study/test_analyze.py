"""The routing study against loops over the router logits that transformers returns, row by row without packing."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finetune.adapter.adapter import load
from finetune.console import Report
from finetune.moe.arch import MoeArch
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import LoadedModel
from finetune.router.metrics import LAYER_METRICS
from finetune.router.study.analyze import study
from finetune.router.study.analyze_page import MAX_CARDS, render_analysis, runs
from finetune.router.study.analyze_show import show_analysis
from finetune.router.study.probe import Probe, ProbeRow, read_probe
from tests.conftest import REPOSITORY
from tests.router.routing_models import FAMILIES, LAYERS, build_model, random_rows
from tests.running import refused, run_finetune

TINY = REPOSITORY / "recipes" / "tiny-mixtral" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def choices_of(model: Any, row: list[int], top_k: int) -> list[list[list[int]]]:
    """Chosen experts [layer][token][k], the most probable first."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
    return [
        [sorted(range(len(token)), key=lambda e, token=token: -token[e])[:top_k] for token in layer.tolist()]
        for layer in logits
    ]


def brute_force(model: Any, probe: Probe, top_k: int) -> dict[str, list[dict[str, Any]]]:
    """For each domain and layer: load, repetition, and all (token, experts)."""
    chosen = [(row, choices_of(model, row.ids, top_k)) for row in probe.rows]
    found: dict[str, list[dict[str, Any]]] = {}
    for domain in probe.domains:
        of_domain = [(row.ids, layers) for row, layers in chosen if row.domain == domain]
        found[domain] = []
        for layer in range(len(of_domain[0][1])):
            routed = [(t, e) for ids, layers in of_domain for t, e in zip(ids, layers[layer], strict=True)]
            neighbours = [pair for _, layers in of_domain for pair in pairwise(layers[layer])]
            found[domain].append(
                {
                    "routed": routed,
                    "repeat_first": sum(a[0] == b[0] for a, b in neighbours) / len(neighbours),
                    "repeat_any": sum(bool(set(a) & set(b)) for a, b in neighbours) / len(neighbours),
                }
            )
    return found


def assert_equal(document: dict[str, Any], want: dict[str, list[dict[str, Any]]], experts: int, top_k: int) -> None:
    assert [domain["name"] for domain in document["domains"]] == list(want)
    for domain in document["domains"]:
        for got, of_layer in zip(domain["layers"], want[domain["name"]], strict=True):
            assert domain["tokens"] == len(of_layer["routed"])
            counts = [sum(e in chosen for _, chosen in of_layer["routed"]) for e in range(experts)]
            assert got["load"] == pytest.approx([n / domain["tokens"] / top_k for n in counts], abs=1e-6)
            assert got["max_vio"] == pytest.approx(max(counts) / (domain["tokens"] * top_k) * experts - 1)
            for name in ("repeat_first", "repeat_any"):
                assert got[name] == pytest.approx(of_layer[name]), name
            assert set(got) == {"load", *LAYER_METRICS}
    for layer in range(document["layers"]):
        routed = [pair for of_layers in want.values() for pair in of_layers[layer]["routed"]]
        for i, j in combinations(range(experts), 2):
            both = sum({i, j} <= set(chosen) for _, chosen in routed)
            assert document["coactivation"][layer][i][j] == document["coactivation"][layer][j][i] == both
        for expert, row in zip(document["favourites"][layer], document["coactivation"][layer], strict=True):
            takes = sum(expert["expert"] in chosen for _, chosen in routed)
            assert row[expert["expert"]] == takes
            for liked in expert["tokens"]:
                assert liked["count"] >= 1
                assert liked["lift"] == pytest.approx(liked["share"] / (takes / len(routed)), rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_study_equals_loops_over_router_logits(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(family).eval()
    experts, top_k = FAMILIES[family]
    rows = random_rows([60, 3, 41, 7, 80, 2, 33], seed=3)
    probe = Probe("made", [ProbeRow("ab"[number > 3], row) for number, row in enumerate(rows)])
    arch = MoeArch.from_config(model.config.to_dict())
    loaded = LoadedModel(model, tokenizer, arch, BaseSpec("made"), torch.device("cpu"))  # type: ignore[arg-type]
    document = study(loaded, probe, name=family)
    assert (document["layers"], document["experts"], document["top_k"]) == (LAYERS, experts, top_k)
    assert document["tokens"] == sum(map(len, rows))
    assert_equal(document, brute_force(model, probe, top_k), experts, top_k)
    # The coloured text is the beginning of each domain.
    for text, ids in zip(document["texts"], (rows[0], rows[4]), strict=True):
        chosen = choices_of(model, ids, top_k)
        assert text["layers"] == [0, 1, 2]
        assert text["first"] == [[token[0] for token in chosen[layer]] for layer in text["layers"]]
        assert "".join(text["pieces"]) == tokenizer.decode(ids)
    first, shared = document["random"].values()
    assert first == 1 / experts
    assert shared == pytest.approx(1 - math.comb(experts - top_k, top_k) / math.comb(experts, top_k))


def test_the_bundled_model_and_text(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load(str(TINY), device="cpu")
    probe = read_probe(tokenizer, max_tokens=1_200)
    document = study(loaded, probe, name="tiny")
    assert_equal(document, brute_force(loaded.model, probe, 2), 8, 2)
    # In the first layer code and French have other busiest experts.
    loads = {domain["name"]: domain["layers"][0]["load"] for domain in document["domains"]}
    assert max(range(8), key=loads["code"].__getitem__) != max(range(8), key=loads["french"].__getitem__)
    liked = [token["text"] for expert in document["favourites"][0] for token in expert["tokens"]]
    assert {"<s>", "\n"} & set(liked)
    json.dumps(document, allow_nan=False)


def test_table_5_of_the_paper(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its two baselines follow from 2 of 8; its means are those that the paper's text speaks of."""
    from finetune.router.study.analyze import PAPER

    assert PAPER["random"]["repeat_first"] == 0.125
    assert PAPER["random"]["repeat_any"] == pytest.approx(0.464, abs=5e-4)
    assert all(len(row) == 3 for rows in (PAPER["first"], PAPER["any"]) for row in rows.values())
    assert PAPER["first"]["Wikipedia"] == [0.144, 0.236, 0.253]
    assert PAPER["any"]["GitHub"] == [0.499, 0.669, 0.492]


# ---- command, tables and page ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analyzed(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], str]:
    """What the command printed, its document, and the page."""
    folder = tmp_path_factory.mktemp("study")
    ran = run_finetune(
        "router", "analyze", small_mixtral, "--max-tokens", 1_500, "--device", "cpu",
        "--html", folder / "study.html", "--out", folder / "study.json",
    )  # fmt: skip
    assert ran.status == 0, ran.stderr
    return ran, json.loads((folder / "study.json").read_text()), (folder / "study.html").read_text(encoding="utf-8")


def test_the_tables_say_what_the_document_says(analyzed: tuple[Any, dict[str, Any], str]) -> None:
    ran, document, _ = analyzed
    german = next(domain for domain in document["domains"] if domain["name"] == "german")
    line = next(line for line in ran.stdout.splitlines() if "german" in line)
    for share in german["layers"][0]["load"]:
        assert f" {100 * share:.1f} " in line
    assert "Neighbouring tokens with the same first" in ran.stdout
    assert "PubMed abstracts" in ran.stdout
    assert "Favourite tokens in layer 0" in ran.stdout
    # Without colour the expert's number stands behind each token.
    assert "<s>" + "₀₁₂₃"[document["texts"][0]["first"][0][0]] in ran.stdout
    assert "page: " in ran.stdout


def test_json_is_the_document(small_mixtral: Path, tmp_path: Path, analyzed: tuple[Any, dict[str, Any], str]) -> None:
    ran = run_finetune("router", "analyze", small_mixtral, "--max-tokens", 1_500, "--device", "cpu", "--json")
    assert ran.document == analyzed[1]


def test_the_page_asks_nothing_of_the_network(analyzed: tuple[Any, dict[str, Any], str]) -> None:
    page = analyzed[2]
    assert "default-src 'none'" in page
    for word in ("<script", "http://", "https://", "@import", "src="):
        assert word not in page, word
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<figure") == 6 + 1 + 2 + 2  # domains and all text, two drawings, pairs of both layers
    for name in ("english", "italian", "code", "StackExchange"):
        assert name in page


def test_hostile_text_stays_text_on_the_page_and_in_the_terminal(analyzed: tuple[Any, dict[str, Any], str]) -> None:
    document = json.loads(json.dumps(analyzed[1]))
    document["model"] = document["domains"][0]["name"] = "<script>alert(1)</script>"
    document["texts"][0]["pieces"][:3] = ["</span><img src=x>", "\x1b[31mred", "\u202eturned"]
    document["favourites"][0][0]["tokens"] = [{"text": "<b>\x07", "share": 1.0, "lift": 2.0, "count": 10}]
    page = render_analysis(document)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;b&gt;\\x07" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    ran: list[str] = []

    class Listening(Report):
        def line(self, text: str = "") -> None:
            ran.append(text)

    show_analysis(document, Listening())
    assert ran


def test_many_experts_are_shown_by_the_most_telling(analyzed: tuple[Any, dict[str, Any], str]) -> None:
    document = json.loads(json.dumps(analyzed[1]))
    experts = 128
    document["experts"] = experts
    for part in [document["overall"], *document["domains"]]:
        for layer in part["layers"]:
            layer["load"] = [1 / experts] * experts
    token = {"text": "x", "share": 1.0, "lift": 2.0, "count": 10}
    document["favourites"] = [
        [{"expert": e, "tokens": [{**token, "lift": 2.0 + e}]} for e in range(experts)] for _ in range(2)
    ]
    document["coactivation_lift"] = [[[None if i == j else 1.0 for j in range(experts)] for i in range(experts)]] * 2
    page = render_analysis(document)
    assert page.count('class="expert"') == 2 * MAX_CARDS
    assert page.count("<svg") == 6 + 1 + 2  # no map of 16,384 pairs
    show_analysis(document, Report(as_json=True))


def test_runs_keep_the_text() -> None:
    found = list(runs(["<s>", " The", " cat", "\n  sat", "."], [3, 1, 1, 1, 0]))
    assert [(run.expert, run.space) for run in found] == [(3, ""), (1, " "), (0, "")]
    assert "".join(run.space + "".join(text for text, _ in run.stretches) for run in found) == "<s> The cat\n  sat."


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_without_experts(tmp_path: Path, small_mixtral: Path) -> None:
    config = json.loads((small_mixtral / "config.json").read_text())
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refused(tmp_path, "router", "analyze", dense, says=("'llama' is not a mixture of experts", "allowed: mixtral"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, "router", "analyze", tmp_path / "gone", says=("gone",))


def test_data_that_is_empty_or_a_page_that_cannot_be_written(tmp_path: Path, small_mixtral: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(
        tmp_path, "router", "analyze", small_mixtral, "--data", tmp_path / "empty.jsonl",
        says=("the data file is empty",),
    )  # fmt: skip
    refused(
        tmp_path, "router", "analyze", small_mixtral, "--html", tmp_path,
        says=("the file cannot be written", "is a folder", "--html"),
    )  # fmt: skip
    refused(
        tmp_path, "router", "analyze", small_mixtral, "--out", tmp_path / "empty.jsonl" / "a.json",
        says=("the file cannot be written", "is a file", "--out"),
    )  # fmt: skip


def test_a_saved_model_loads_the_same_in_transformers(small_mixtral: Path) -> None:
    """The study's routing is that of the plain model wherever nothing is quantized: the first layer's router input."""
    plain = AutoModelForCausalLM.from_pretrained(small_mixtral, dtype=torch.float32)
    row = [1, 500, 700, 900]
    loaded = load(str(small_mixtral), device="cpu", attention="16bit")
    probe = Probe("made", [ProbeRow("a", row)])
    document = study(loaded, probe, name="small")
    assert document["texts"][0]["first"][0] == [token[0] for token in choices_of(plain, row, 2)[0]]
