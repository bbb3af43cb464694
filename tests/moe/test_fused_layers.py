"""Who gets liger-kernel's layers, and what is said to who cannot have them. What they compute is tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import ModelError
from finetune.moe import fused_layers
from finetune.moe.fused_layers import wants_fused_layers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("wanted", "device", "model_type", "expected"),
    [
        ("auto", CUDA, "mixtral", True),
        ("auto", CUDA, "qwen3_moe", True),
        ("auto", CUDA, "olmoe", False),
        ("auto", CPU, "mixtral", False),
        (True, CUDA, "mixtral", True),
        (False, CUDA, "mixtral", False),
    ],
)
def test_who_gets_them(wanted: fused_layers.FusedLayers, device: torch.device, model_type: str, expected: bool) -> None:
    assert wants_fused_layers(wanted, device, model_type) is expected


@pytest.mark.usefixtures("installed")
def test_asked_for_on_a_cpu() -> None:
    with pytest.raises(ModelError) as error:
        wants_fused_layers(True, CPU, "mixtral")
    assert str(error.value) == (
        "fused layers are asked for, but the model is on the cpu\n"
        "  where: model.fused_layers\n"
        "  allowed: auto, true (on a GPU, with liger-kernel, for mixtral, qwen3_moe), false\n"
        "  fix: set model.fused_layers=auto"
    )


def test_asked_for_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: None)
    assert not wants_fused_layers("auto", CUDA, "mixtral")
    with pytest.raises(ModelError, match="the package liger-kernel is not installed") as error:
        wants_fused_layers(True, CUDA, "mixtral")
    assert "fix: pip install -e '.[kernels]', or choose auto" in str(error.value)
