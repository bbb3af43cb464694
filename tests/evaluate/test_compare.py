"""Every measure of `finetune evaluate` against whole models run apart in a plain loop, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.adapter.adapter import load
from finetune.console import Report
from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.evaluate.command import run_evaluate
from finetune.evaluate.divergence import Said, row_sums
from finetune.moe.load import LoadedModel
from finetune.recipe.load import load_recipe
from tests.export.tunings import tuned, update
from tests.running import run_finetune

ROWS, LAYERS, TOP_K = 4, 2, 2
Answer = tuple[torch.Tensor, list[torch.Tensor]]


def of_one_row(model: Any, row: Any) -> Answer:
    """float64 log-probabilities [T, V] and the chosen experts of each layer, from transformers' own outputs."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True)
    return out.logits[0].double().log_softmax(-1), [logits.topk(TOP_K).indices for logits in out.router_logits]


def brute_force(reference: Sequence[Answer], other: Sequence[Answer], rows: Sequence[Any]) -> dict[str, Any]:
    kl, agreed, nll, tokens, supervised = 0.0, 0, [0.0, 0.0], 0, 0
    shared = [0] * LAYERS
    alike, alike_kl = 0, 0.0
    for row, (p, chosen), (q, other_chosen) in zip(rows, reference, other, strict=True):
        for place in range(len(row["input_ids"])):
            of_place = float((p[place].exp() * (p[place] - q[place])).sum())
            kl += of_place
            if all(set(a[place].tolist()) == set(b[place].tolist()) for a, b in zip(chosen, other_chosen, strict=True)):
                alike, alike_kl = alike + 1, alike_kl + of_place
            agreed += int(p[place].argmax() == q[place].argmax())
            for layer in range(LAYERS):
                pair = (set(chosen[layer][place].tolist()), set(other_chosen[layer][place].tolist()))
                shared[layer] += len(pair[0] & pair[1])
            target = [*row["labels"][1:], -100][place]
            if target != -100:
                supervised += 1
                nll[0] -= float(p[place, target])
                nll[1] -= float(q[place, target])
        tokens += len(row["input_ids"])
    return {
        "tokens": tokens,
        "supervised_tokens": supervised,
        "loss": nll[1] / supervised,
        "loss_difference": (nll[1] - nll[0]) / supervised,
        "kl": kl / tokens,
        "greedy_agreement": agreed / tokens,
        "routed_alike": alike / tokens,
        "kl_routed_alike": alike_kl / alike,
        "top_k_overlap_by_layer": [count / (tokens * TOP_K) for count in shared],
    }


def held_out(conversations: Path, loaded: LoadedModel) -> list[Any]:
    reading = Reading(Source(str(conversations), max_rows=ROWS))
    return list(encode_source(reading, loaded.tokenizer, Supervision()).dataset)


def assert_measured(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found["loss"]["value"] == pytest.approx(want["loss"], rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(want["loss"]), rel=1e-5)
    assert found["loss_difference"]["value"] == pytest.approx(want["loss_difference"], rel=1e-3, abs=1e-6)
    assert found["kl"]["value"] == pytest.approx(want["kl"], rel=1e-3, abs=1e-9)
    assert found["greedy_agreement"]["value"] == want["greedy_agreement"]
    assert found["routed_alike"]["value"] == want["routed_alike"]
    assert found["kl_routed_alike"]["value"] == pytest.approx(want["kl_routed_alike"], rel=1e-3, abs=1e-9)
    overlaps = [layer["value"] for layer in found["top_k_overlap_by_layer"]]
    assert overlaps == pytest.approx(want["top_k_overlap_by_layer"], abs=1e-12)
    assert found["top_k_overlap"]["value"] == pytest.approx(sum(overlaps) / LAYERS)
    for name in ("loss", "kl", "greedy_agreement", "top_k_overlap"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name


def test_equals_whole_models_run_apart(
    small_mixtral: Path, tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A live adapter in its run's folder, whose held-out rows are taken, beside its base and its bf16 merge."""
    adapter, recipe = tmp_path / "run" / "adapter", load_recipe(write_recipe())
    live: Any = tuned(small_mixtral, adapter, scale=0.3)  # so much that the models differ
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    merged = run_finetune("merge", adapter, "--output", tmp_path / "bf16", "--format", "bf16")
    assert merged.status == 0, merged.stderr
    others = ("base", str(tmp_path / "bf16"))
    document = run_evaluate(str(adapter), Report(), others=others, max_rows=ROWS, device="cpu")
    comparison = document["comparison"]
    reference, base, bf16 = comparison["models"]
    assert [one["model"] for one in comparison["models"]] == [str(adapter), *others]
    assert reference["stored"] == base["stored"] == "nf4 experts, nf4 attention"
    assert bf16["stored"] == "float32"  # the bf16 values, which a CPU computes with in float32
    assert reference["kl"] is None
    assert recipe.data.eval is not None
    rows = held_out(Path(recipe.data.eval), live)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    of_live = [of_one_row(live.model, row) for row in rows]
    with live.model.disable_adapter():
        of_base = [of_one_row(live.model, row) for row in rows]
    for found, said in ((base, of_base), (bf16, [of_one_row(plain, row) for row in rows])):
        want = brute_force(of_live, said, rows)
        assert_measured(found, want)
        assert (comparison["tokens"], comparison["supervised_tokens"]) == (want["tokens"], want["supervised_tokens"])
        assert reference["loss"]["value"] == pytest.approx(want["loss"] - want["loss_difference"], rel=1e-6)
    assert bf16["kl"]["value"] < base["kl"]["value"] / 10

    shown = capsys.readouterr().out
    assert f"{ROWS} conversations of {recipe.data.eval}: {comparison['tokens']} tokens" in shown
    for title in ("Loss of the supervised tokens", "Against ", "Top-k expert overlap by layer", "Size of the update"):
        assert title in shown
    assert f"{base['kl']['value']:.2e}" in shown
    assert f"[{base['kl']['low']:.2e}," in shown

    # The update of each layer: float64 norms of s B A over those of the base's stored weights.
    weights = load_file(small_mixtral / "model.safetensors")
    (updated,) = document["updates"]
    assert updated["model"] == str(adapter)
    for layer in updated["layers"]:
        names = [f"model.layers.{layer['layer']}.self_attn.{p}_proj.weight" for p in "qkvo"]
        squares = sum(float((update(adapter, name, weights[name]) ** 2).sum()) for name in names)
        base_squares = sum(float((weights[name].double() ** 2).sum()) for name in names)
        assert layer["relative"] == pytest.approx(math.sqrt(squares / base_squares), rel=1e-6)


@pytest.mark.slow
def test_an_nf4_merge_and_another_adapter_as_well(small_mixtral: Path, conversations: Path, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("adapter", "nf4", "other")]
    live = tuned(small_mixtral, names[0], scale=0.3)
    assert run_finetune("merge", names[0], "--output", names[1], "--device", "cpu").status == 0
    other = tuned(small_mixtral, names[2], scale=0.3, seed=5)
    options = ("--compare", names[1], "--compare", names[2], "--data", conversations, "--max-rows", ROWS)
    ran = run_finetune("evaluate", names[0], *options, "--device", "cpu", "--json")
    assert ran.status == 0, ran.stderr
    models = ran.document["comparison"]["models"]
    rows = held_out(conversations, live)
    of_live = [of_one_row(live.model, row) for row in rows]
    for found, model in zip(models[1:], (load(str(names[1]), device="cpu").model, other.model), strict=True):
        assert_measured(found, brute_force(of_live, [of_one_row(model, row) for row in rows], rows))
    assert models[1]["stored"] == "nf4 experts, 16bit attention"
    assert [update["model"] for update in ran.document["updates"]] == [str(names[0]), str(names[2])]


def test_a_row_is_summed_piece_by_piece() -> None:
    """1,200 positions, against numpy in float64."""
    made = torch.Generator().manual_seed(0)
    logits = [torch.randn(1200, 50, generator=made) * 3 for _ in range(2)]
    chosen = [torch.stack([torch.randperm(8, generator=made)[:2] for _ in range(1200)]) for _ in range(4)]
    labels = torch.randint(0, 50, (1200,), generator=made)
    labels[::3] = -100
    found = row_sums(Said(logits[0], chosen[:2]), Said(logits[1], chosen[2:]), labels)
    p, q = (x.double().numpy() - np.log(np.exp(x.double().numpy()).sum(1, keepdims=True)) for x in logits)
    places = [place for place in range(1199) if labels[place + 1] != -100]
    assert found.tokens == 1200
    assert found.supervised == len(places)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-10)
    assert found.agreed == (p.argmax(1) == q.argmax(1)).sum()
    assert found.reference_nll == pytest.approx(-sum(p[i, labels[i + 1]] for i in places), rel=1e-10)
    assert found.candidate_nll == pytest.approx(-sum(q[i, labels[i + 1]] for i in places), rel=1e-10)
    assert found.largest == pytest.approx(float((logits[0] - logits[1]).abs().max()))
    for layer in range(2):
        both = zip(chosen[layer].tolist(), chosen[layer + 2].tolist(), strict=True)
        assert found.shared[layer] == sum(len(set(a) & set(b)) for a, b in both)
