"""What every router said in the last pass, against the logits that transformers returns."""

import pytest
import torch
from torch import nn

from finetune.errors import ModelError
from finetune.router.hook import Recording
from tests.router.routing_models import FAMILIES, LAYERS, build_model, random_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_choices_are_those_of_the_last_pass(family: str) -> None:
    model, (_, top_k) = build_model(family).eval(), FAMILIES[family]
    first, second = (torch.tensor([row]) for row in random_rows([7, 4]))
    with torch.no_grad(), Recording(model) as recording:
        assert recording.logits == []
        model(input_ids=first)
        kept = recording.indices
        want = model(input_ids=second, output_router_logits=True).router_logits
    assert len(recording.logits) == len(recording.indices) == LAYERS
    assert [tuple(indices.shape) for indices in kept] == [(7, top_k)] * LAYERS  # not overwritten by the next pass
    for logits, indices, expected in zip(recording.logits, recording.indices, want, strict=True):
        assert torch.equal(logits, expected)
        for token, chosen in zip(expected.tolist(), indices.tolist(), strict=True):
            assert chosen == sorted(range(len(token)), key=lambda e: -token[e])[:top_k]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_recorded(reentrant: bool) -> None:
    model = build_model("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    row = torch.tensor(random_rows([6]))
    with Recording(model) as recording:
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        before = recording.logits
        loss.backward()
    assert recording.logits is before
    assert not any(logits.requires_grad for logits in before)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = build_model("olmoe").eval()

    def run() -> None:
        with Recording(model):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ModelError, match="0 stacks of layers with a router"), Recording(nn.Linear(2, 2)):
        pass
