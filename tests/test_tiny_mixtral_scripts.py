"""The arithmetic of the scripts that made tiny-mixtral, against transformers' own experts and against brute force."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The script named by the test's parameter; scripts import each other from their own folder."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", ["pretrain_tiny_mixtral"], indirect=True)
def test_every_expert_equals_the_routed_experts(script: ModuleType) -> None:
    torch.manual_seed(0)
    config = script.tiny_config()
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(37, config.hidden_size, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(37, config.num_local_experts, dtype=torch.float64).softmax(-1)
    weights, index = scores.topk(2, dim=-1)
    weights.requires_grad_()
    results = []
    for forward in (experts.forward, lambda *args: script.every_expert(experts, *args)):
        out = forward(hidden, index, weights)
        inputs = (hidden, weights, experts.gate_up_proj, experts.down_proj)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("script", ["pretrain_tiny_mixtral"], indirect=True)
def test_balance_loss_is_taken_layer_by_layer(script: ModuleType) -> None:
    torch.manual_seed(1)
    layers, experts, tokens = 3, 4, 50
    logits = tuple(torch.randn(tokens, experts) for _ in range(layers))
    expected = 0.0
    for layer in logits:
        probs = layer.double().softmax(-1)
        share = [sum(e in row.topk(2).indices.tolist() for row in probs) / (2 * tokens) for e in range(experts)]
        expected += experts * sum(f * p for f, p in zip(share, probs.mean(0).tolist(), strict=True)) / layers
    assert script.balance_loss(logits, 2).item() == pytest.approx(expected, rel=1e-5)
    # Two layers, each collapsed on its own pair of experts, must not cancel: 4 experts on 2 are twice the uniform.
    collapsed = tuple(torch.tensor([[9.0, 9.0, -9, -9]] * 8).roll(shift, -1) for shift in (0, 2))
    assert script.balance_loss(collapsed, 2).item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("script", ["tiny_measure"], indirect=True)
def test_jensen_shannon_and_unigram_entropy(script: ModuleType) -> None:
    assert script.jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert script.jensen_shannon(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == pytest.approx(0.0)
    # Add-one smoothed counts of [0, 0, 1] over three symbols: 3/6, 2/6, 1/6.
    entropy = script.unigram_entropy(np.array([0, 0, 1]), np.array([0, 1, 2, 2]), 3)
    assert entropy == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6) + 2 * math.log(1 / 6)) / 4)


@pytest.mark.parametrize("script", ["text_packages"], indirect=True)
def test_reading_a_gettext_catalogue(script: ModuleType) -> None:
    catalogue = (
        'msgid ""\nmsgstr "Language: de\\n"\n\n'
        '#: a.py:1\nmsgid "Two "\n"lines"\nmsgstr ""\n"Zwei "\n"Zeilen"\n\n'
        '#, fuzzy\nmsgid "Guess"\nmsgstr "Vermutung"\n\n'
        'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] "%d Datei"\nmsgstr[1] "%d Dateien"\n\n'
        'msgid "Untranslated"\nmsgstr ""\n'
    )
    expected = [("Two lines", "Zwei Zeilen"), ("%d file", "%d Datei"), ("%d file", "%d Dateien")]
    assert script.read_po(catalogue) == expected


@pytest.mark.parametrize("script", ["tiny_corpus"], indirect=True)
def test_held_out_documents_are_a_fixed_small_share(script: ModuleType) -> None:
    held_out = [script.is_heldout("python", f"file-{i}.py", 0) for i in range(20_000)]
    assert sum(held_out) / len(held_out) == pytest.approx(script.HELDOUT_SHARE, rel=0.1)
    assert held_out != [script.is_heldout("python", f"file-{i}.py", 1) for i in range(20_000)]
    lines = [("a", [("x y z", "un deux trois"), ("", "un deux trois")]), ("b", [("", "un deux trois"), ("", "court")])]
    assert [doc.text for doc in script.join_strings(lines)] == ["un deux trois"]


@pytest.mark.parametrize("script", ["build_instruction_set"], indirect=True)
def test_rows_that_share_a_message_stay_on_one_side(script: ModuleType) -> None:
    rows = [
        script.Row(("Who wrote it?", "Mary."), "s", "en"),
        script.Row(("Chi l'ha scritto?", "mary"), "s", "it"),  # shares the answer
        script.Row(("Who wrote it", "Jane."), "s", "en"),  # shares the question
        script.Row(("Something else entirely", "Yes, quite."), "s", "en"),
    ]
    sizes = sorted(len(group) for group in script.groups_of(rows))
    assert sizes == [1, 3]
    assert [row.texts[1] for row in script.deduplicate(rows)] == ["Mary.", "mary", "Yes, quite."]
