"""The weights of a loaded model as a decoding step reads them; only LoRA's small matrices are copied.

An engine may hold several LoRA adapters at once, and each row of a batch uses its own. So their matrices are stacked
here, padded with zeros to one rank; row selector 0 is the base, n is adapter n - 1. Trained routers are stacked in the
same way, the base's first.

Leaves out: non-MoE training, whose result is already in the model's own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from finetune.infer.offloaded import OffloadedExperts
from finetune.kernels import PackedExperts, dequantize_linear
from finetune.moe import EXPERT_PROJECTIONS, MoeArch, QuantizedExperts


@dataclass(frozen=True)
class Adapters:
    """LoRA of the projections that read one input, as `kernels.decode.lora_rows` takes it."""

    a_NRI: Tensor
    b_NOR: Tensor
    magnitude_NO: Tensor
    segment_O: Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Projections are the model's own linear layers, 4-bit or plain.

    `fetch` is set where experts are offloaded: it maps chosen experts [T, K] to their slots.
    """

    input_norm: nn.Module
    qkv: tuple[nn.Module, nn.Module, nn.Module]
    qk_norm: tuple[nn.Module, nn.Module] | None
    o: nn.Module
    qkv_adapters: Adapters | None
    o_adapters: Adapters | None
    post_norm: nn.Module
    gates_NEH: Tensor
    top_k: int
    normalize: bool
    gate_up: PackedExperts
    down: PackedExperts
    fetch: Callable[[Tensor], Tensor] | None


def read_layers(decoder: Any, arch: MoeArch, adapters: Sequence[str]) -> list[Layer]:
    """The layers of a decoder (`MixtralModel` and its like), with the named PEFT adapters.

    Args:
        decoder: on its device, in evaluation.
    """
    return [_read_layer(layer, arch, adapters) for layer in decoder.layers]


def _read_layer(layer: Any, arch: MoeArch, adapters: Sequence[str]) -> Layer:
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate, experts = layer.mlp.gate, layer.mlp.experts
    offloaded = isinstance(experts, OffloadedExperts)
    assert offloaded or isinstance(experts, QuantizedExperts), type(experts)
    both = [experts.gate_up, experts.down] if offloaded else [experts.packed(name) for name in EXPERT_PROJECTIONS]
    router: Any = gate.original_module if isinstance(gate, ModulesToSaveWrapper) else gate
    return Layer(
        input_norm=layer.input_layernorm,
        qkv=(_base_layer(attention.q_proj), _base_layer(attention.k_proj), _base_layer(attention.v_proj)),
        qk_norm=(attention.q_norm, attention.k_norm) if arch.qk_norm else None,
        o=_base_layer(attention.o_proj),
        qkv_adapters=_stack_adapters(projections, adapters),
        o_adapters=_stack_adapters([attention.o_proj], adapters),
        post_norm=layer.post_attention_layernorm,
        gates_NEH=_stack_gates(gate, router, adapters),
        top_k=router.top_k,
        # Mixtral's router always divides; the others say so in their config.
        normalize=arch.model_type == "mixtral" or bool(router.norm_topk_prob),
        gate_up=both[0],
        down=both[1],
        fetch=experts.fetch if offloaded else None,
    )


def _base_layer(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _stack_gates(gate: Any, router: Any, adapters: Sequence[str]) -> Tensor:
    """[1 + N, E, H], or [1, E, H] as a view where no adapter has routers of its own."""
    base = router.weight.detach()
    if not isinstance(gate, ModulesToSaveWrapper):
        return base.unsqueeze(0)
    saved: Any = gate.modules_to_save
    own = [saved[name].weight.detach() if name in saved else base for name in adapters]
    return torch.stack([base, *(weight.to(base.device, base.dtype) for weight in own)])


def _stack_adapters(projections: Sequence[Any], adapters: Sequence[str]) -> Adapters | None:
    """None where no projection has LoRA. Ranks are padded with zeros to the largest."""
    with_lora: list[Any] = [layer for layer in projections if isinstance(layer, LoraLayer)]
    ranks = [layer.r[name] for layer in with_lora for name in adapters if name in layer.r]
    if not ranks:
        return None
    rank = max(ranks)
    base = [_base_layer(layer) for layer in projections]
    in_, outs = base[0].in_features, [layer.out_features for layer in base]
    some = with_lora[0].lora_A[next(name for name in adapters if name in with_lora[0].r)].weight
    a = some.new_zeros(len(adapters), len(projections) * rank, in_)
    b = some.new_zeros(len(adapters), sum(outs), rank)
    magnitude = torch.ones(len(adapters), sum(outs), device=some.device)
    starts = [sum(outs[:number]) for number in range(len(outs))]
    for number, (projection, start, out) in enumerate(zip(projections, starts, outs, strict=True)):
        layer: Any = projection
        for index, name in enumerate(adapters):
            if not isinstance(layer, LoraLayer) or name not in layer.r:
                continue
            lora: Any = layer
            own_a, own_b = lora.lora_A[name].weight.detach(), lora.lora_B[name].weight.detach()
            a[index, number * rank : number * rank + own_a.shape[0]] = own_a
            scaled = own_b * lora.scaling[name]
            b[index, start : start + out, : own_b.shape[1]] = scaled
            if name in lora.lora_magnitude_vector:
                updated = dequantize_linear(_base_layer(layer)) + scaled.float() @ own_a.float()
                saved = lora.lora_magnitude_vector[name].weight.detach().float()
                magnitude[index, start : start + out] = saved / updated.norm(dim=1)
    segment = torch.repeat_interleave(torch.arange(len(outs)), torch.tensor(outs)).int().to(some.device)
    return Adapters(a, b, magnitude, segment)
