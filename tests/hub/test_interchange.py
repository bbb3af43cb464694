"""Adapters go both ways: ours in stock peft on a stock Mixtral, others' here; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.adapter.adapter import Adapter, load
from finetune.adapter.lora import add_attention_lora, load_adapter, save_adapter
from finetune.errors import AdapterError
from finetune.moe.arch import MoeArch
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import LoadedModel, load_base
from tests.conftest import REPOSITORY
from tests.models import dequantized_twin

TINY = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
TEXT = "The keys of a dictionary must be hashable. If a key is not found, a default is returned, or KeyError is raised."
# What PEFT 0.7 wrote for a Mixtral under transformers 4.
OLD_CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}


def stock(dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, device_map="cpu")


@pytest.fixture(scope="module")
def ids(base: LoadedModel) -> Tensor:
    return torch.tensor([base.tokenizer(TEXT)["input_ids"]])


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float()


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) a token, nats."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_base(BaseSpec(str(TINY), attention="16bit"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def twin(base: LoadedModel) -> PreTrainedModel:
    """A stock Mixtral in float32 with the values that our 4-bit experts stand for."""
    return dequantized_twin(base.model)


@pytest.fixture
def mine(tmp_path: Path, base: LoadedModel, ids: Tensor) -> Iterator[tuple[Path, Tensor, Tensor]]:
    """A LoRA adapter with an update of some percent; with our logits without and with it."""
    before = logits(base.model, ids)
    torch.manual_seed(1)
    model = add_attention_lora(base.model, base.arch, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.07)
    save_adapter(model, tmp_path / "adapter")
    base.base.save(tmp_path / "adapter")
    yield tmp_path / "adapter", before, logits(model, ids)
    model.unload()


def test_ours_in_stock_peft_on_a_stock_mixtral(
    mine: tuple[Path, Tensor, Tensor], twin: PreTrainedModel, ids: Tensor
) -> None:
    folder, before, live = mine
    # On the values that our experts stand for, only the order of summation differs.
    on_twin = PeftModel.from_pretrained(twin, str(folder))
    torch.testing.assert_close(logits(on_twin, ids), live, rtol=0, atol=2e-4)
    on_twin.unload()
    # On the 16-bit checkpoint, the two differ by the experts' rounding to 4 bits and by bfloat16: as much as they do
    # without the adapter, and less than the adapter moves them.
    plain = stock(torch.bfloat16)
    rounding = kl(logits(plain, ids), before)
    moved = kl(live, before)
    theirs = logits(PeftModel.from_pretrained(plain, str(folder)), ids)
    assert kl(theirs, live) < 1.5 * rounding
    assert moved > 3 * rounding


def foreign(folder: Path, arch: MoeArch, **changes: Any) -> dict[str, Tensor]:
    """An adapter as transformers 4 and PEFT of that time left it: no base.json, no tokenizer; returns its tensors."""
    folder.mkdir()
    config = OLD_CONFIG | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(arch.layers):
        for target in ("q_proj", "v_proj"):
            out, in_ = arch.attention_shapes()[target]
            path = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, in_, generator=made)
            tensors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(out, 4, generator=made)
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def test_an_adapter_of_transformers_4_loads_here(tmp_path: Path, base: LoadedModel, ids: Tensor) -> None:
    tensors = foreign(tmp_path / "old", base.arch)
    loaded = load(str(tmp_path / "old"), base_path=str(TINY), device="cpu", dtype="float32")
    assert loaded.base.path == str(TINY)
    assert loaded.tokenizer.vocab_size == base.tokenizer.vocab_size
    live = logits(loaded.model, ids)
    # The truth: W + 16/4 B A by hand, on the values that our 4-bit base stands for, attention included.
    by_hand = dequantized_twin(cast(PeftModel, loaded.model).unload())
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                weight = by_hand.get_parameter(path.removeprefix("base_model.model.") + ".weight")
                weight.data += 16 / 4 * tensors[f"{path}.lora_B.weight"] @ a
    torch.testing.assert_close(live, logits(by_hand, ids), rtol=0, atol=2e-4)


def test_what_does_not_fit_is_refused_by_its_reason(tmp_path: Path, base: LoadedModel) -> None:
    def says(folder: str) -> str:
        with pytest.raises(AdapterError) as caught:
            load_adapter(base.model, tmp_path / folder)
        return str(caught.value)

    foreign(tmp_path / "experts", base.arch, target_modules=["q_proj", "w1", "w2", "w3"])
    assert "cannot train 'w1' with LoRA: the experts are frozen in 4 bits" in says("experts")
    foreign(tmp_path / "gate", base.arch, target_modules=["q_proj", "gate"])
    assert "cannot train 'gate' with LoRA" in says("gate")
    foreign(tmp_path / "rank", base.arch, r=8)
    assert "does not fit this model at r=8: 24 tensors of another shape" in says("rank")
    foreign(tmp_path / "half", base.arch, target_modules=["q_proj", "v_proj", "k_proj"])
    assert "12 missing" in says("half")
    foreign(tmp_path / "other", replace(base.arch, hidden=64, heads=2))
    assert "does not fit this model at r=4: 18 tensors of another shape" in says("other")
    for named, says_of in (("mistralai/Mixtral-8x7B-v0.1", "cannot be read"), (None, "does not say which base")):
        foreign(tmp_path / str(named).partition("/")[0], base.arch, base_model_name_or_path=named)
        with pytest.raises(AdapterError, match=says_of) as caught:
            Adapter.open(tmp_path / str(named).partition("/")[0]).require_base()
        assert "with --base" in str(caught.value)
