"""Random full-shape models have the structure and storage of loaded ones.

Truth: the model that `from_pretrained` makes of a checkpoint with the same config.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.kernels.packed_experts import ExpertStorage, dequantize_expert
from finetune.moe import Moe4bitConfig
from finetune.moe.census import require_quantized_experts, take_census
from finetune.moe.random_weights import build_random_model
from tests.models import EXPERTS, FAMILIES, dequantized_twin, tiny_config, tiny_model, tokens


def build(
    family: str,
    attention: str = "nf4",
    *,
    experts: ExpertStorage = "nf4",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **overrides: bool,
) -> PreTrainedModel:
    return build_random_model(
        tiny_config(family, **overrides),
        Moe4bitConfig(attention=attention, experts=experts),
        dtype=dtype,
        device=torch.device("cpu"),
        attn_implementation="sdpa",
        seed=seed,
    )


@pytest.mark.parametrize("attention", ["nf4", "16bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_structure_and_bytes_equal_those_of_a_loaded_model(tmp_path: Path, family: str, attention: str) -> None:
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Moe4bitConfig(attention=attention))
    built = build(family, attention)

    def describe(model: PreTrainedModel) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        tensors = model.state_dict(keep_vars=True)
        return {
            name: (tensor.shape, tensor.dtype, tensor.requires_grad)
            for name, tensor in tensors.items()
            if "quant_state" not in name
        }

    assert describe(built) == describe(loaded)
    census = take_census(built)
    assert census == take_census(loaded)
    require_quantized_experts(census)
    assert {name: type(module) for name, module in built.named_modules()} == {
        name: type(module) for name, module in loaded.named_modules()
    }
    assert (built.is_loaded_in_4bit, built.quantization_method) == (attention == "nf4", "moe_4bit")


@pytest.mark.parametrize(("experts", "bits"), [("hqq2", 2), ("hqq3", 3)])
def test_experts_of_fewer_bits_have_the_spread_of_the_config(experts: ExpertStorage, bits: int) -> None:
    model, spread = build("mixtral", experts=experts, dtype=torch.float32), tiny_config("mixtral").initializer_range
    for name in ("gate_up_proj", "down_proj"):
        stack = model.get_submodule("model.layers.0.mlp.experts").packed(name)  # type: ignore[operator]
        weight = dequantize_expert(stack, 0, torch.float32)
        assert len(weight.unique()) == 2**bits
        assert weight.std().item() == pytest.approx(spread, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * spread


def test_values_are_drawn_and_the_rotary_tables_are_real() -> None:
    model = build("mixtral")
    plain = tiny_model("mixtral")
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(model.model.rotary_emb.original_inv_freq, plain.model.rotary_emb.original_inv_freq)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.02)
    experts = [
        dequantize_expert(layer.mlp.experts.packed("down_proj"), expert, torch.float32)
        for layer in model.model.layers
        for expert in range(EXPERTS)
    ]
    for expert in experts:
        assert expert.std().item() == pytest.approx(0.1, rel=0.03)
    assert not any(torch.equal(experts[0], other) for other in experts[1:])


def test_it_runs_like_its_dequantized_twin() -> None:
    model = build("mixtral", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = model(tokens()).logits, dequantized_twin(model)(tokens()).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_seed_decides_every_bit() -> None:
    first, again, other = build("olmoe"), build("olmoe"), build("olmoe", seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    packed = "model.layers.0.mlp.experts.gate_up_proj_packed"
    assert not torch.equal(other.state_dict()[packed], first.state_dict()[packed])


def test_tied_embeddings_stay_tied() -> None:
    model = build("qwen3_moe", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_saves_and_loads(tmp_path: Path) -> None:
    model = build("mixtral").eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
