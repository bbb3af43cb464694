"""Training everything but the experts, as fp32 masters."""

from __future__ import annotations

from torch import nn

from finetune.adapter.masters import trainable_count
from finetune.errors import FinetuneError
from finetune.moe import MoeArch, role_of


def unfreeze_non_moe(model: nn.Module, arch: MoeArch, *, router: bool = False) -> None:
    """Attention, norms, embeddings and head train as fp32 masters; experts stay frozen, the router too unless asked.

    The router becomes fp32 either way (exactly, and it is small): the residual stream that it multiplies is fp32 then.

    Raises:
        FinetuneError: the attention is quantized.
    """
    tuned = non_moe_parameters(model, router=router)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in tuned or role_of(name) == "router":
            parameter.data = parameter.data.float()
    for parameter in tuned.values():
        parameter.requires_grad_(True)
    count, expected = trainable_count(model), arch.non_moe_params(router=router)
    assert count == expected, f"{count} parameters train, the formula says {expected}"


def non_moe_parameters(model: nn.Module, *, router: bool) -> dict[str, nn.Parameter]:
    """Parameters outside the experts by name, tied ones once; refuses a quantized attention."""
    roles = {"attention", "norm", "embedding", "head", *(["router"] if router else [])}
    tuned = {name: parameter for name, parameter in model.named_parameters() if role_of(name) in roles}
    quantized = [name for name, parameter in tuned.items() if not parameter.is_floating_point()]
    if quantized:
        raise FinetuneError(
            f"4-bit weights cannot train: {len(quantized)} attention matrices are quantized",
            where=f"quantization.attention, found at {quantized[0]}",
            allowed="quantization.attention must be 16bit for trainable.method: non_moe",
            fix="set quantization.attention: 16bit",
        )
    return tuned
