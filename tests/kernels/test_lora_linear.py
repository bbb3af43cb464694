"""The fused LoRA linear against PEFT's own layers and float64 autograd."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from finetune.adapter.lora import FusedLoraLinear, FusedLoraLinear4bit, register_lora_layers
from finetune.kernels.lora import lora_linear
from finetune.kernels.nf4 import dequantize_linear, nf4_of_linear

IN, OUT, RANK = 128, 192, 8


class Holder(nn.Module):
    """One projection, as PEFT finds it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.q_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def make_layer(kind: str, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    if kind == "16bit":
        return nn.Linear(IN, OUT, bias=False).to(dtype)
    return Linear4bit(
        IN, OUT, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    ).to("cpu")


def with_lora(layer: nn.Linear, *, fused: bool, **config: object) -> nn.Module:
    settings = LoraConfig(r=RANK, lora_alpha=32, target_modules=["q_proj"], **config)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = get_peft_model(Holder(layer), register_lora_layers(settings) if fused else settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradient
            nn.init.normal_(parameter, std=0.1)
    return model


def run(model: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(torch.cos(torch.arange(y.numel()).view_as(y)).to(y.dtype))
    a, b = (p.grad for name, p in sorted(model.named_parameters()) if p.requires_grad)
    return [y.detach(), x.grad, a, b]


def truth(model: nn.Module, x: Tensor) -> list[Tensor]:
    projection = model.base_model.model.q_proj
    weight = dequantize_linear(projection.get_base_layer()).double()
    a, b = (p["default"].weight.detach().double().requires_grad_() for p in (projection.lora_A, projection.lora_B))
    x = x.double().requires_grad_()
    y = x @ weight.T + projection.scaling["default"] * (x @ a.T @ b.T)
    y.backward(torch.cos(torch.arange(y.numel()).view_as(y)).double())
    return [y.detach(), x.grad, a.grad, b.grad]


@pytest.mark.parametrize("kind", ["16bit", "nf4"])
@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
def test_as_exact_as_peft(kind: str, mode: str) -> None:
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x = torch.randn(2, 33, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    fused, plain = (with_lora(make_layer(kind, dtype), fused=f) for f in (True, False))
    assert type(fused.base_model.model.q_proj) is (FusedLoraLinear if kind == "16bit" else FusedLoraLinear4bit)
    for mine, peft, exact in zip(
        run(fused, x, autocast=mode == "autocast"),
        run(plain, x, autocast=mode == "autocast"),
        truth(fused, x),
        strict=True,
    ):
        error, baseline = (((t.double() - exact).norm() / exact.norm()).item() for t in (mine, peft))
        # Measured ratios: 0.8 to 1.1, but for two cases in which PEFT keeps float32 and we bfloat16 (errors of 3e-3):
        # the update outside autocast, and bitsandbytes' product under it.
        assert error <= max(1.2 * baseline, 1e-6 if mode == "float32" else 5e-3)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=str)
def test_the_unusual_stays_pefts(config: dict[str, object]) -> None:
    layer = make_layer("16bit", torch.float32)
    x = torch.randn(5, IN)
    fused, plain = (with_lora(layer, fused=f, **config) for f in (True, False))
    torch.manual_seed(3)
    mine = fused(x)
    torch.manual_seed(3)
    assert torch.equal(mine, plain(x))


def test_disabled_and_merged_adapters() -> None:
    layer = make_layer("16bit", torch.float32)
    x = torch.randn(5, IN)
    expected = layer(x)
    model = with_lora(layer, fused=True)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    adapted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)


def test_keeps_only_the_input_and_its_projection() -> None:
    layer = make_layer("nf4", torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(33, IN, requires_grad=True)
    a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(x, nf4_of_linear(layer), a, b, 2.0)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(33, IN), (33, RANK), (RANK, IN), (OUT, RANK)])


def test_only_the_input_needs_a_gradient() -> None:
    x = torch.randn(4, IN, requires_grad=True)
    lora_linear(x, torch.randn(OUT, IN), torch.randn(RANK, IN), torch.randn(OUT, RANK), 1.0).sum().backward()
    assert x.grad is not None


def test_a_resident_weight_gives_the_same_bits() -> None:
    x = torch.randn(33, IN, generator=torch.Generator().manual_seed(2)).bfloat16()
    model = with_lora(make_layer("nf4", torch.bfloat16), fused=True)
    before = run(model, x)
    model.zero_grad()
    model.base_model.model.q_proj.keep_dequantized(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, x), strict=True))
    assert not [name for name in model.state_dict() if "resident" in name]
