"""A model whose experts have 2 or 3 bits: quantized while loading, saved, loaded again, adapted, merged.

Truth: the same solver on each expert's matrix, a plain model with the dequantized weights, and the bytes of files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.adapter.adapter import load
from finetune.errors import FinetuneError, ModelError
from finetune.export.quantized import write_quantized
from finetune.infer.engine import Engine
from finetune.infer.request import Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from finetune.kernels.packed_experts import quantize_experts
from finetune.memory.static import expert_bytes
from finetune.moe import Moe4bitConfig
from finetune.moe.base_spec import BaseSpec
from finetune.moe.census import require_quantized_experts, take_census
from finetune.moe.load import load_base
from finetune.moe.quantizer import EXPERT_BYTES_PER_WEIGHT
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, dequantized_twin, save_fused, save_lora, tiny_model
from tests.moe.loading import assert_same_bits, bits, logits, relative_error, reload, tensors_of
from tests.running import run_finetune

TINY = Path(__file__).parents[2] / "recipes" / "tiny-mixtral" / "model"
STORAGES = ("hqq2", "hqq3")
SHAPES = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))


def quantized(folder: Path, storage: Any, family: str = "mixtral") -> Any:
    plain = tiny_model(family, dtype=torch.bfloat16)
    save_fused(plain, folder)
    config = Moe4bitConfig(experts=storage)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("storage", STORAGES)
def test_loading_gives_the_bits_of_the_solver_and_the_logits_of_the_dequantized_weights(
    tmp_path: Path, storage: Any
) -> None:
    model = quantized(tmp_path / "plain", storage)
    file = tensors_of(tmp_path / "plain")
    for layer in range(LAYERS):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for projection in ("gate_up_proj", "down_proj"):
            by_hand = quantize_experts(storage, file[f"model.layers.{layer}.mlp.experts.{projection}"].float())
            for found, expected in zip(experts.packed(projection), by_hand, strict=True):
                assert torch.equal(found, expected)
    assert relative_error(logits(model), logits(dequantized_twin(model))) < 1e-5
    # The scales stay fp16 whatever the model becomes.
    assert {t.dtype for t in model.to(torch.bfloat16).get_submodule("model.layers.0.mlp.experts").parameters()} == {
        torch.uint8,
        torch.float16,
    }


@pytest.mark.parametrize("storage", STORAGES)
def test_census_quantizer_and_estimate_count_the_same_bytes(tmp_path: Path, storage: Any) -> None:
    census = take_census(quantized(tmp_path / "plain", storage))
    require_quantized_experts(census)
    by_hand = sum(out * in_ * (2 if storage == "hqq2" else 3) // 8 + out * in_ // 64 * 4 for out, in_ in SHAPES)
    (row,) = [row for row in census.rows if row.role == "experts"]
    assert (row.dtype, row.tensors, row.bytes) == (storage, LAYERS * 4, LAYERS * EXPERTS * by_hand)
    assert sum(expert_bytes(out * in_, storage) for out, in_ in SHAPES) == by_hand
    assert sum(out * in_ for out, in_ in SHAPES) * EXPERT_BYTES_PER_WEIGHT[storage] == by_hand


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("olmoe", marks=pytest.mark.slow),
    ],
)
def test_a_saved_folder_knows_its_own_and_is_read_as_it_is(tmp_path: Path, family: str) -> None:
    model = quantized(tmp_path / "plain", "hqq2", family)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (config["experts"], config["format_version"]) == ("hqq2", 2)
    for dtype in (torch.float32, torch.bfloat16):
        again = reload(tmp_path / "saved", dtype=dtype)
        experts = {name: tensor for name, tensor in bits(again).items() if ".experts." in name}
        assert_same_bits(experts, {name: tensor for name, tensor in bits(model).items() if ".experts." in name})
        if dtype == torch.float32:
            assert torch.equal(logits(again), logits(model))


def test_nf4_folders_are_what_they_were(tmp_path: Path) -> None:
    """Version 1, without a word about the experts: folders of before load, and earlier releases read new ones."""
    model = quantized(tmp_path / "plain", "nf4")
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "moe_4bit", "attention": "nf4", "format_version": 1}
    quantization: Any = reload(tmp_path / "saved").config.quantization_config
    assert quantization.experts == "nf4"


def test_an_adapter_of_the_nf4_base_goes_onto_the_folder(tmp_path: Path, small_mixtral: Path) -> None:
    """`--base DIR`, whose fingerprint is the routers'; merged, the experts keep their bytes."""
    census = write_quantized(str(small_mixtral), tmp_path / "two", experts="hqq2", device="cpu")
    assert {row.dtype for row in census.rows if row.role == "experts"} == {"hqq2"}
    adapter = save_lora(small_mixtral, tmp_path / "adapter", std=0.1)
    here = load(str(adapter), base_path=str(tmp_path / "two"), dtype="float32", device="cpu")
    assert here.base.experts == "hqq2"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, without = here.model(ids).logits, load(str(tmp_path / "two"), dtype="float32", device="cpu").model
        assert not torch.equal(without(ids).logits, expected)
        again = load(str(adapter), base_path=str(tmp_path / "two"), dtype="float32", device="cpu")
        assert torch.equal(again.model(ids).logits, expected)
    to = ("--base", tmp_path / "two", "--output", tmp_path / "merged", "--device", "cpu")
    assert run_finetune("merge", adapter, *to).status == 0
    before, after = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "merged")
    names = [name for name in before if ".experts." in name]
    assert sorted(names) == sorted(name for name in after if ".experts." in name)
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert load(str(tmp_path / "merged"), device="cpu").base.experts == "hqq2"


def test_refused_by_quantize(tmp_path: Path, small_mixtral: Path) -> None:
    with pytest.raises(FinetuneError) as caught:
        write_quantized(str(small_mixtral), tmp_path / "out", experts="int2", device="cpu")
    assert "expert storage 'int2' does not exist" in str(caught.value)
    assert "where: --experts" in str(caught.value)
    write_quantized(str(small_mixtral), tmp_path / "nf4", device="cpu")
    with pytest.raises(ModelError) as caught_too:
        write_quantized(str(tmp_path / "nf4"), tmp_path / "out", experts="hqq2", device="cpu")
    assert "the folder keeps its experts in nf4 already" in str(caught_too.value)
    assert "fix: start from the original checkpoint" in str(caught_too.value)
    assert not (tmp_path / "out").exists()


def test_random_weights(small_mixtral: Path) -> None:
    loaded = load_base(BaseSpec(str(small_mixtral), experts="hqq3"), device="cpu", random_weights_seed=0)
    assert loaded.base.experts == "hqq3"
    assert {row.dtype for row in take_census(loaded.model).rows if row.role == "experts"} == {"hqq3"}


def test_the_engine_answers_with_generates_tokens(tmp_path: Path) -> None:
    """Prompts go through the model's forward, tokens through the decoding step: both on 2-bit experts."""
    write_quantized(str(TINY), tmp_path / "two", experts="hqq2", device="cpu")
    with Engine.load(
        str(tmp_path / "two"), device="cpu", settings=EngineSettings(max_batch=2, max_length=64)
    ) as engine:
        ids = engine.encode_text("The capital of France is")
        found = [event.token for event in engine.stream(Request(ids, Sampling(max_new_tokens=10)))
                 if isinstance(event, TokenEvent)]  # fmt: skip

        def greedy(loaded: Any) -> list[int]:
            out = loaded.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=10, do_sample=False)
            return out[0, len(ids) :].tolist()

        assert found == engine.run(greedy)
