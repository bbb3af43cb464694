"""The byte census against sizes computed from the config's numbers alone, and its refusals.

Truth: bytes by hand from shapes; the pieces of a 4-bit weight are written out here once more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig, PreTrainedModel

from finetune.errors import ModelError
from finetune.moe import Moe4bitConfig
from finetune.moe.census import require_quantized_experts, take_census
from finetune.moe.quantizer import Moe4bitQuantizer
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB, dequantized_twin, tiny_config, tiny_model

# Mixtral of tests/models.py: 4 query and 2 key-value heads of 48.
ATTENTION = ((192, HIDDEN), (96, HIDDEN), (96, HIDDEN), (HIDDEN, 192))
EXPERT = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
ROTARY_BUFFERS = 2 * 24 * 4  # inverse frequencies and their original, float32, half a head each


def nf4_bytes(out: int, in_: int) -> int:
    """Nibbles, 8-bit scales, a float32 scale for each 256 of them, and the float32 offset."""
    scales = out * in_ // 64
    return out * in_ // 2 + scales + -(-scales // 256) * 4 + 4


def load(folder: Path, attention: str = "nf4") -> PreTrainedModel:
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Moe4bitConfig(attention=attention))


def rows(model: torch.nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row.role, row.dtype): (row.tensors, row.bytes) for row in take_census(model).rows}


def expected_rows(attention: tuple[str, int]) -> dict[tuple[str, str], tuple[int, int]]:
    dtype, attention_bytes = attention
    return {
        ("experts", "nf4"): (LAYERS * 8, LAYERS * EXPERTS * sum(nf4_bytes(*shape) for shape in EXPERT)),
        ("attention", dtype): (LAYERS * 4, attention_bytes),
        ("router", "bfloat16"): (LAYERS, LAYERS * EXPERTS * HIDDEN * 2),
        ("norm", "bfloat16"): (2 * LAYERS + 1, (2 * LAYERS + 1) * HIDDEN * 2),
        ("embedding", "bfloat16"): (1, VOCAB * HIDDEN * 2),
        ("head", "bfloat16"): (1, VOCAB * HIDDEN * 2),
        ("other", "float32"): (2, ROTARY_BUFFERS),
    }


def test_bytes_equal_those_of_the_shapes(tmp_path: Path) -> None:
    model = load(tmp_path, "16bit")
    sixteen = LAYERS * sum(out * in_ * 2 for out, in_ in ATTENTION)
    assert rows(model) == expected_rows(("bfloat16", sixteen))


def test_hidden_state_of_4bit_attention_counts(tmp_path: Path) -> None:
    """bitsandbytes keeps, beside each matrix's nibbles and scales, its 16 code values and a map of 256 8-bit scales."""
    model = load(tmp_path / "plain")
    matrices = LAYERS * sum(nf4_bytes(*shape) + (16 + 256) * 4 for shape in ATTENTION)
    assert rows(model) == expected_rows(("nf4", matrices))
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert rows(again) == expected_rows(("nf4", matrices))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    found = rows(model)
    assert found["embedding", "float32"] == (1, VOCAB * HIDDEN * 4)
    assert (("head", "float32") in found) == (not tied)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert take_census(model).total_bytes == sum(p.numel() * 4 for p in model.parameters()) + buffers


def test_total_is_the_sum_and_json_holds_everything(tmp_path: Path) -> None:
    census = take_census(load(tmp_path))
    assert census.total_bytes == sum(row.bytes for row in census.rows)
    content = json.loads(json.dumps(census.to_dict()))
    assert content["total_bytes"] == census.total_bytes
    assert {"role": "router", "dtype": "bfloat16", "tensors": LAYERS, "bytes": 2 * 4 * 128 * 2} in content["rows"]
    assert content["unquantized_experts"] == []


def test_an_adapter_is_a_role_of_its_own(tmp_path: Path) -> None:
    base = load(tmp_path)
    before = rows(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    elements = LAYERS * 4 * ((192 + HIDDEN) + (96 + HIDDEN))
    found = rows(model)
    (adapter,) = [key for key in found if key[0] == "adapter"]
    assert found.pop(adapter) == (LAYERS * 4, elements * torch.finfo(getattr(torch, adapter[1])).bits // 8)
    assert found == before


def test_a_quantized_model_passes(tmp_path: Path) -> None:
    for attention in ("nf4", "16bit"):
        model = load(tmp_path / attention, attention)
        require_quantized_experts(take_census(model))
        with pytest.raises(ModelError):
            require_quantized_experts(take_census(dequantized_twin(model)))


def test_full_size_mixtral_in_16_bit_is_refused() -> None:
    """The model of the classic command, as transformers 5 would load it: its experts alone are 84 GiB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(), dtype=torch.bfloat16)
    census = take_census(model)
    assert sum(row.bytes for row in census.rows if row.role == "experts") == 32 * 8 * 3 * 4096 * 14336 * 2
    with pytest.raises(ModelError) as caught:
        require_quantized_experts(census)
    message = str(caught.value)
    assert "64 expert tensors (84.00 GiB) are not quantized" in message
    assert "where: model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj" in message
    assert "and 60 more" in message
    assert "allowed: experts in nf4, hqq3 or hqq2" in message
    assert "fix: load through `finetune` or with quantization_config=Moe4bitConfig()" in message


def test_what_load_in_4bit_leaves_behind_is_refused(tmp_path: Path) -> None:
    """transformers' own 4-bit loading quantizes attention and says nothing about the experts."""
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    census = take_census(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))
    assert ("attention", "nf4") in {(row.role, row.dtype) for row in census.rows}
    assert [size for _, size in census.unquantized_experts] == [
        EXPERTS * out * in_ * 2 for _ in range(LAYERS) for out, in_ in EXPERT
    ]
    with pytest.raises(ModelError, match="4 expert tensors"):
        require_quantized_experts(census)


def test_experts_that_still_wait_for_their_weights_are_refused() -> None:
    """A skeleton before loading: right modules, no weights."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    quantizer = Moe4bitQuantizer(Moe4bitConfig(), pre_quantized=False)
    quantizer.preprocess_model(model=skeleton, dtype=torch.float32)
    with pytest.raises(ModelError, match="4 expert tensors"):
        require_quantized_experts(take_census(skeleton))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    with pytest.raises(ModelError) as caught:
        require_quantized_experts(take_census(AutoModelForCausalLM.from_config(config)))
    assert "the model holds no experts at all" in str(caught.value)
    assert "fix: load a mixture of experts with quantization_config=Moe4bitConfig()" in str(caught.value)
