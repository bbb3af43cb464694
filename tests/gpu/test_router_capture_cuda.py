"""The capture on a device: the sums of the CPU, and never a synchronization with the host before it is read."""

from __future__ import annotations

import pytest
import torch

from finetune.router.capture import RouterCapture
from tests.models import tiny_model, tokens

DEVICE = torch.device("cuda")


@pytest.fixture
def strict() -> object:
    """Operations that would wait for the device raise."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_sums_equal_the_cpus_without_a_synchronization(strict: object) -> None:
    model = tiny_model("mixtral").to(DEVICE).train()
    config = model.config
    capture = RouterCapture(model, num_experts=config.num_local_experts, top_k=config.num_experts_per_tok)
    said: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _a, output: said.append(output))
    ids = tokens(3, 50).to(DEVICE)
    labels = ids.clone()
    labels[:, :10] = -100
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    model(input_ids=ids, attention_mask=mask, labels=labels)  # what the experts wait for is not the capture's

    capture.attach()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        assert capture.begin({"input_ids": ids, "attention_mask": mask}, labels, training=True)
        for layer, output in enumerate(said):
            capture.hear(layer, output[0], output[2])
        capture.end()
    torch.cuda.set_sync_debug_mode("default")
    on_device = capture.snapshot_parts("train")

    host = RouterCapture(model, num_experts=config.num_local_experts, top_k=config.num_experts_per_tok)
    host.attach()
    for _ in range(2):
        assert host.begin({"input_ids": ids.cpu(), "attention_mask": mask.cpu()}, labels.cpu(), training=True)
        for layer, output in enumerate(said):
            host.hear(layer, output[0].cpu(), output[2].cpu())
        host.end()
    for part, want in host.snapshot_parts("train").items():
        got = on_device[part]
        assert (got.tokens, got.pairs) == (want.tokens, want.pairs)
        for name in ("counts", "same_first", "shared_any"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for name in ("prob_sum", "z_sum", "entropy_sum", "top1_sum"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
