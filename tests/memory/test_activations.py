"""Plans change what is kept, never a bit of a loss or a gradient.

Truth: the same model and batch without any checkpointing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from finetune.memory.activations import ActivationPlan, LayerPlan, apply_plan, plan_activations, remove_plan
from finetune.moe.arch import MoeArch, router_path
from tests.models import FAMILIES, HIDDEN, LAYERS, tiny_model, tokens
from tests.moe.loading import QKVO, load

FULL, NONE = ActivationPlan.full(LAYERS), ActivationPlan.none(LAYERS)
# Every combination in some layer, keeps in other places than the planner would put them, too.
PLANS = {
    "full": FULL,
    "none": NONE,
    "gate_up": ActivationPlan.last(LAYERS, attention=0, gate_up=LAYERS),
    "attention": ActivationPlan.last(LAYERS, attention=LAYERS, gate_up=0),
    "last": ActivationPlan.last(LAYERS, attention=1, gate_up=1),
    "first": ActivationPlan((LayerPlan(True, True), LayerPlan(False, False))),
    "crossed": ActivationPlan((LayerPlan(True, False), LayerPlan(False, True))),
}


def quantized(folder: Path, family: str = "mixtral", *, lora: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    tiny_model(family).save_pretrained(folder)
    model = load(folder, "nf4" if lora else "16bit").to(dtype)
    if not lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." not in name)
        return model
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(QKVO), init_lora_weights=False))
    return model.to(dtype)


def arch_of(model: Any) -> MoeArch:
    return MoeArch.from_config(model.config.to_dict())


def step(model: Any) -> dict[str, Tensor]:
    """The loss and every gradient of one training step."""
    model.train()
    model.zero_grad(set_to_none=True)
    batch = tokens(2, 17)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {"loss": loss.detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert different == []


# ---- bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "non_moe"])
def test_no_plan_changes_a_bit(tmp_path: Path, lora: bool, dtype: torch.dtype) -> None:
    model = quantized(tmp_path, lora=lora, dtype=dtype)
    expected = step(model)
    assert any("layers.0." in name for name in expected)
    for plan in PLANS.values():
        apply_plan(model, arch_of(model), plan)
        assert_same(step(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    model = quantized(tmp_path, family)
    expected = step(model)
    for name in ("full", "crossed"):
        apply_plan(model, arch_of(model), PLANS[name])
        assert_same(step(model), expected)


def test_under_autocast_with_float32_masters(tmp_path: Path) -> None:
    model = quantized(tmp_path, lora=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        for plan in PLANS.values():
            apply_plan(model, arch_of(model), plan)
            assert_same(step(model), expected)


def test_evaluation_is_untouched(tmp_path: Path) -> None:
    model, batch = quantized(tmp_path).eval(), tokens()
    calls = count_calls(model, "self_attn")
    expected = model(batch, use_cache=False).logits
    apply_plan(model, arch_of(model), FULL)
    found = model(batch, use_cache=False).logits
    assert torch.equal(found, expected)
    found.sum().backward()
    assert calls() == 2 * LAYERS, "nothing was recomputed"
    assert model.generate(batch, max_new_tokens=3, do_sample=False).shape[1] == batch.shape[1] + 3


# ---- what is recomputed ---------------------------------------------------------------------------------------


def count_calls(model: nn.Module, ending: str) -> Callable[[], int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for name, module in model.named_modules():
        if name.endswith(ending):
            module.register_forward_hook(count)
    return lambda: calls[0]


@pytest.mark.parametrize(
    ("plan", "attention"), [("none", 0), ("full", LAYERS), ("gate_up", LAYERS), ("attention", 0), ("last", 1)]
)
def test_only_what_the_plan_drops_is_recomputed(tmp_path: Path, plan: str, attention: int) -> None:
    model = quantized(tmp_path)
    apply_plan(model, arch_of(model), PLANS[plan])
    attention_calls, experts_calls = count_calls(model, "self_attn"), count_calls(model, "mlp.experts")
    step(model)
    assert attention_calls() - LAYERS == attention
    assert experts_calls() == LAYERS, "a recomputation ends before the experts have multiplied anything"


# ---- the routing ----------------------------------------------------------------------------------------------


def disturb_recomputed_routers(model: Any, arch: MoeArch) -> Callable[[], int]:
    """Gives every router noise in every call but its first; returns how many calls got it."""
    disturbed: list[int] = [0]
    first: set[nn.Module] = set()

    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if module not in first:
            first.add(module)
            return None
        disturbed[0] += 1
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(5)).to(args[0].dtype)
        return (args[0] + 10 * noise, *args[1:])

    base = model.get_base_model()
    for index in range(arch.layers):
        base.get_submodule(router_path(index)).register_forward_pre_hook(pre_hook)
    return lambda: disturbed[0]


def test_a_recomputed_routing_is_not_used(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    arch = arch_of(model)
    expected = step(model)
    apply_plan(model, arch, FULL)
    disturbed = disturb_recomputed_routers(model, arch)
    assert_same(step(model), expected)
    assert disturbed() == LAYERS, "the routers ran again, with other experts as their choice"


def test_without_the_hooks_a_recomputed_routing_would_be_used(tmp_path: Path) -> None:
    """The same disturbance under transformers' own checkpointing: the test above can fail."""
    model = quantized(tmp_path)
    arch = arch_of(model)
    expected = step(model)
    apply_plan(model, arch, FULL)
    remove_plan(model, arch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for index in range(arch.layers):
        model.get_base_model().model.layers[index].mlp.experts.keep_gate_up = False
    disturb_recomputed_routers(model, arch)
    found = step(model)
    assert torch.equal(found["loss"], expected["loss"])
    assert any(not torch.equal(found[name], grad) for name, grad in expected.items())


def test_a_disturbed_attention_moves_gradients_but_not_the_routing(tmp_path: Path) -> None:
    """Noise in the recomputed attention that would flip most tokens: every expert still gets its own rows back."""
    model = quantized(tmp_path)
    arch = arch_of(model)
    expected = step(model)
    apply_plan(model, arch, FULL)
    chosen: dict[nn.Module, list[Tensor]] = {}
    calls: set[nn.Module] = set()

    def remember(module: nn.Module, _args: Any, output: Any) -> None:
        chosen.setdefault(module, []).append(output[2])

    def disturb(module: nn.Module, _args: Any, output: Any) -> Any:
        if module not in calls:
            calls.add(module)
            return None
        noise = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(6))
        return (output[0] + 3 * noise, *output[1:])

    base = model.get_base_model()
    for layer in base.model.layers:
        layer.mlp.gate.register_forward_hook(remember)
        layer.self_attn.register_forward_hook(disturb)
    found = step(model)
    for first, second in chosen.values():
        assert (first != second).any(1).float().mean() > 0.3, "the recomputed routing differs for many tokens"
    assert torch.equal(found["loss"], expected["loss"])
    # It is another gradient, as it must be, and it came without an error about the shapes of experts' rows.
    assert all(found[name].isfinite().all() for name in expected)
    assert any(not torch.equal(found[name], grad) for name, grad in expected.items())


def test_hooks_are_balanced_when_a_router_fails(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    apply_plan(model, arch_of(model), FULL)
    gate = model.get_base_model().model.layers[0].mlp.gate

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    handle = gate.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        step(model)
    handle.remove()
    packed = []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor):
        torch.ones(3, requires_grad=True).exp()
    assert len(packed) == 1, "hooks of the failed call are still on top"


def test_a_forward_pass_without_backward_is_freed_at_once(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    apply_plan(model, arch_of(model), NONE)
    seen: list[weakref.ref[Tensor]] = []
    gate = model.get_base_model().model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _module, _args, output: seen.append(weakref.ref(output[1])))
    gc.collect()
    gc.disable()
    try:
        model.train()(tokens(), use_cache=False)
        assert seen[0]() is None, "a cycle holds the routing's graph"
    finally:
        gc.enable()


# ---- applying -------------------------------------------------------------------------------------------------


def test_applying_twice_is_applying_once(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    arch = arch_of(model)
    gate, embedding = model.get_base_model().model.layers[0].mlp.gate, model.get_input_embeddings()
    before = [len(hooks) for hooks in (gate._forward_pre_hooks, gate._forward_hooks, embedding._forward_hooks)]
    apply_plan(model, arch, PLANS["crossed"])
    once = [len(hooks) for hooks in (gate._forward_pre_hooks, gate._forward_hooks, embedding._forward_hooks)]
    assert once == [before[0] + 1, before[1] + 1, before[2]]
    apply_plan(model, arch, PLANS["last"])
    apply_plan(model, arch, PLANS["last"])
    assert [len(hooks) for hooks in (gate._forward_pre_hooks, gate._forward_hooks, embedding._forward_hooks)] == once
    layers = model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert [layer.mlp.experts.keep_gate_up for layer in layers] == [False, True]
    remove_plan(model, arch)
    assert [len(hooks) for hooks in (gate._forward_pre_hooks, gate._forward_hooks, embedding._forward_hooks)] == before
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    with pytest.raises(AssertionError, match="a plan for 3 layers, a model of 2"):
        apply_plan(model, arch_of(model), ActivationPlan.full(3))


# ---- planning -------------------------------------------------------------------------------------------------


def test_the_plan_is_the_best_that_fits() -> None:
    """Against all 6 x 6 plans; the first gate_up outputs may cost nothing, because the peak is elsewhere."""
    layers = 5
    for attention_bytes, gate_up_bytes, free in ((3, 7, 0), (7, 3, 0), (1, 1, 1), (4, 9, 1), (0, 5, 2)):
        for costs in ((1.0, 1.0), (1.0, 4.0), (5.0, 1.0)):
            for room in range(0, 60, 3):

                def needs(plan: ActivationPlan, a: int = attention_bytes, g: int = gate_up_bytes, f: int = free) -> int:
                    return a * plan.attention_layers + g * max(0, plan.gate_up_layers - f)

                def fits(plan: ActivationPlan, room: int = room, needs: Any = needs) -> bool:
                    return needs(plan) <= room

                plan = plan_activations(layers, fits, attention_cost=costs[0], gate_up_cost=costs[1])
                assert fits(plan)

                def saved(a: int, g: int, costs: tuple[float, float] = costs) -> float:
                    return a * costs[0] + g * costs[1]

                every = [ActivationPlan.last(layers, attention=a, gate_up=g) for a in range(6) for g in range(6)]
                best = max(saved(p.attention_layers, p.gate_up_layers) for p in every if fits(p))
                assert saved(plan.attention_layers, plan.gate_up_layers) == best


def test_the_extremes_of_planning() -> None:
    costs = {"attention_cost": 1.0, "gate_up_cost": 4.0}
    assert plan_activations(4, lambda plan: True, **costs) == ActivationPlan.none(4)
    assert plan_activations(4, lambda plan: False, **costs) == ActivationPlan.full(4)


def test_keeps_go_to_the_last_layers() -> None:
    plan = ActivationPlan.last(4, attention=1, gate_up=3)
    assert [layer.keep_attention for layer in plan.layers] == [False, False, False, True]
    assert [layer.keep_gate_up for layer in plan.layers] == [False, True, True, True]
    assert str(plan) == "3 of 4 layers keep the gate_up output, 1 keep attention"


def test_checkpoint_and_hooks_of_torch_do_what_this_builds_on() -> None:
    """Hooks inside a checkpoint take precedence over its own, in the forward pass and in the recomputation alike."""
    seen = []

    def inner(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
            y = x.exp()
        return y.sin()

    x = torch.ones(HIDDEN, requires_grad=True)
    checkpoint(inner, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert torch.allclose(x.grad, torch.cos(x.exp()) * x.exp())  # type: ignore[arg-type]
