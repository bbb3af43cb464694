"""The parameters that train: how many they are, that they stay fp32, and whole again where they are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def trainable_count(model: nn.Module) -> int:
    """Number of parameters that train; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def keep_fp32_masters(model: nn.Module) -> Iterator[None]:
    """Undoes any cast of the trainable parameters inside the block, exactly.

    TRL's SFTTrainer casts whatever trains to bf16 when the base is quantized: build the trainer inside this block.
    """
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name].to(parameter.device)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains, by name, detached and whole.

    Shards (FSDP2) are gathered, so every process must call it.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
