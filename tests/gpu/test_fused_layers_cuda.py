"""liger-kernel's norms and rotary embedding in a whole model: as near to float64 as transformers' own in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("liger_kernel")

from finetune.moe.fused_layers import fuse_layers
from tests.models import tiny_model, tokens

DEVICE = torch.device("cuda")


def run(dtype: torch.dtype, *, fused: bool) -> list[Tensor]:
    """Logits, and the gradients of every norm and of the embeddings."""
    torch.manual_seed(0)
    model = tiny_model("mixtral", dtype=torch.float64).to(DEVICE, dtype)
    model.set_experts_implementation("eager")
    if fused:
        fuse_layers(model)
    logits = model(tokens(2, 40).to(DEVICE), use_cache=False).logits
    logits.square().mean().backward()
    names = [name for name, _ in model.named_parameters() if "norm" in name or "embed_tokens" in name]
    return [logits.detach().double(), *(model.get_parameter(name).grad.double() for name in names)]


def test_as_exact_as_transformers() -> None:
    # The rotary embedding is exchanged for the process: everything without it comes first.
    true, plain = run(torch.float64, fused=False), run(torch.bfloat16, fused=False)
    fused = run(torch.bfloat16, fused=True)
    for mine, theirs, exact in zip(fused, plain, true, strict=True):
        error, baseline = ((found - exact).norm() / exact.norm() for found in (mine, theirs))
        # A routing that flips under bfloat16's rounding costs either of them the same.
        assert error <= 2 * baseline + 1e-3
