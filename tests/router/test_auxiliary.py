"""The auxiliary losses and their gradients against brute force in float64, one unpadded row at a time.

The reference takes live router logits from transformers itself, counts choices in Python and writes the formulas out
for the whole batch of a step; nothing of it knows micro-batches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.router.auxiliary import AuxiliaryLoss
from finetune.router.capture import RouterCapture
from tests.router.routing_models import FAMILIES, LAYERS, build_model, pad_right, random_rows

BALANCE, Z = 0.7, 0.3
LENGTHS = [9, 4, 7, 1, 5, 6]


def auxiliary_of(model: nn.Module, family: str = "mixtral", **coefficients: float) -> AuxiliaryLoss:
    experts, top_k = FAMILIES[family]
    both = {"balance_coef": BALANCE, "z_coef": Z, **coefficients}
    return AuxiliaryLoss(model, num_experts=experts, top_k=top_k, **both)


def brute_force(model: Any, rows: list[list[int]], experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Mean over layers of E * sum_i f_i P_i, and of the mean logsumexp^2, live, over all tokens of `rows`."""
    by_layer: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for row in rows:
        for layer, logits in enumerate(model(torch.tensor([row]), output_router_logits=True).router_logits):
            by_layer[layer].append(logits)
    balance, z = [], []
    for layer in by_layer:
        tokens = torch.cat(layer)
        counts = [0] * experts
        for token in tokens.tolist():
            for expert in sorted(range(experts), key=lambda e: -token[e])[:top_k]:
                counts[expert] += 1
        probabilities = tokens.exp() / tokens.exp().sum(1, keepdim=True)
        shares = [count / (len(tokens) * top_k) for count in counts]
        balance.append(experts * sum(f * probabilities[:, expert].mean() for expert, f in enumerate(shares)))
        z.append((tokens.exp().sum(1).log() ** 2).mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def step(model: Any, auxiliary: AuxiliaryLoss, batches: list[dict[str, Tensor]], *, ahead: bool) -> float:
    """Accumulates the gradients of a step's auxiliary loss; returns its value."""
    auxiliary.begin_step()
    if ahead:
        auxiliary.count_ahead(batches, lambda batch: model(**batch), torch.device("cpu"))
    value = 0.0
    for batch in batches:
        model(**batch)
        part = auxiliary.part()
        part.backward()
        value += part.item()
    return value


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_equal_brute_force(family: str, checkpointing: bool) -> None:
    model: Any = build_model(family).double().train()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    rows = random_rows(LENGTHS)
    balance, z = brute_force(model, rows, *FAMILIES[family])
    (BALANCE * balance + Z * z).backward()
    expected = gradients(model)
    assert expected["model.layers.0.mlp.gate.weight"].norm() > 1e-4
    assert expected["model.embed_tokens.weight"].norm() > 1e-4
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for size, ahead in ((6, False), (6, True), (2, True), (1, True)):
        batches = [pad_right(rows[start : start + size]) for start in range(0, 6, size)]
        with auxiliary_of(model, family) as auxiliary:
            value = step(model, auxiliary, batches, ahead=ahead)
            logged = auxiliary.logs()
        found = gradients(model)
        assert value == pytest.approx((BALANCE * balance + Z * z).item(), rel=1e-6)
        assert logged == pytest.approx(
            {"router/aux/balance": balance.item(), "router/aux/z": z.item(), "router/aux/weighted": value}, rel=1e-6
        )
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # Measured: 2e-7 of the largest, from the families' own softmax in float32.
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())


def test_layers_that_collapse_apart_are_not_balanced() -> None:
    """Every layer on another pair of eight experts: E / k each, where pooling all layers would read 1."""

    class Collapsed(nn.Module):
        def __init__(self, pair: int):
            super().__init__()
            self.logits = nn.Parameter(torch.full((8,), -50.0).index_fill(0, torch.tensor([pair, pair + 1]), 50.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.logits.expand(x.reshape(-1, x.shape[-1]).shape[0], 8)
            scores, indices = logits.softmax(-1).topk(2)
            return logits, scores, indices

    model: Any = build_model("mixtral").train()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = Collapsed(2 * number)
    with auxiliary_of(model, balance_coef=1.0, z_coef=0.0) as auxiliary:
        assert step(model, auxiliary, [pad_right(random_rows(LENGTHS))], ahead=False) == pytest.approx(4.0)


def test_only_training_steps_are_seen_and_the_capture_sees_no_counting() -> None:
    model: Any = build_model("mixtral").train()
    rows = random_rows(LENGTHS)
    batches = [pad_right(rows[start : start + 2]) for start in (0, 2, 4)]
    experts, top_k = FAMILIES["mixtral"]
    with auxiliary_of(model) as auxiliary, RouterCapture(model, num_experts=experts, top_k=top_k) as capture:
        auxiliary.begin_step()
        model.eval()(**batches[0])
        with torch.no_grad():
            model.train()(**batches[0])
        with pytest.raises(AssertionError, match="no forward pass of the decoder in training"):
            auxiliary.part()
        step(model, auxiliary, batches, ahead=True)
        assert capture.snapshot("train").tokens == sum(LENGTHS)
    model(**batches[0])
    with pytest.raises(AssertionError):
        auxiliary.part()


def test_without_a_balance_loss_tokens_are_counted_without_a_forward_pass() -> None:
    model: Any = build_model("mixtral").train()
    rows = random_rows(LENGTHS)
    _, z = brute_force(model, rows, *FAMILIES["mixtral"])
    batches = [pad_right(rows[start : start + 2]) for start in (0, 2, 4)]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with auxiliary_of(model, balance_coef=0.0) as auxiliary:
        assert step(model, auxiliary, batches, ahead=True) == pytest.approx(Z * z.item(), rel=1e-5)
        assert auxiliary.logs() == pytest.approx({"router/aux/z": z.item(), "router/aux/weighted": Z * z.item()}, 1e-5)
    assert len(calls) == 3


def test_sixteen_bits_are_computed_in_float32() -> None:
    model: Any = build_model("mixtral").train()
    logits: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: logits.append(output[0]))
    with auxiliary_of(model, balance_coef=0.0, z_coef=1.0) as auxiliary:
        auxiliary.begin_step()
        with torch.autocast("cpu", torch.bfloat16):
            model(**pad_right(random_rows([12])))
            part = auxiliary.part()
    assert {layer.dtype for layer in logits} == {torch.bfloat16}
    expected = torch.stack([layer.double().logsumexp(1).square().mean() for layer in logits]).mean()
    assert part.dtype == torch.float32
    # Measured: 3e-8; a bfloat16 logsumexp is off by 2e-3.
    assert part.item() == pytest.approx(expected.item(), rel=1e-6)
    part.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_what_padding_computes_does_not_matter() -> None:
    model: Any = build_model("mixtral").train()
    batch = pad_right(random_rows(LENGTHS))
    with auxiliary_of(model) as auxiliary:
        expected = step(model, auxiliary, [batch], ahead=False)
        before = gradients(model)
    padded = (batch["attention_mask"] == 0).reshape(-1, 1)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _args, output: (output[0].masked_fill(padded, torch.nan), *output[1:])
        )
    with auxiliary_of(model) as auxiliary:
        assert step(model, auxiliary, [batch], ahead=False) == expected
        assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
