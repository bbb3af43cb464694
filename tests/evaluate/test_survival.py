"""What formats keep of an update: NF4 against PEFT's own merge of stock 4-bit layers, 16 bits against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.evaluate.retention import Kept, Survival, lost_in
from tests.export.tunings import nf4_values, tuned, tuned_non_moe, update
from tests.running import run_finetune

NAMES = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in range(2) for p in "qkvo"]


@pytest.fixture(scope="module")
def adapters(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA adapter for each storage of the attention it was trained on."""
    made = {storage: tmp_path_factory.mktemp(storage) / "adapter" for storage in ("nf4", "16bit")}
    for storage, folder in made.items():
        tuned(small_mixtral, folder, attention=storage, scale=0.003)
    return made


def survives(*args: object) -> list[dict[str, Any]]:
    ran = run_finetune("evaluate", *args, "--survival", "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["comparison"] is None
    return ran.document["survival"]


def projected(after: Tensor, before: Tensor, added: Tensor) -> float:
    return float(((after.double() - before.double()) * added).sum() / (added**2).sum())


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float64 of float32 values rounded to the nearest, even on a tie, by their bits."""
    bits: Any = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def test_nf4_is_what_peft_merges(small_mixtral: Path, adapters: dict[str, Path]) -> None:
    folder = adapters["nf4"]
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock: Any = AutoModelForCausalLM.from_pretrained(
        small_mixtral, quantization_config=four_bit, dtype=torch.float32, device_map="cpu"
    )
    merged: Any = PeftModel.from_pretrained(stock, folder).merge_and_unload()
    (found,) = survives(folder)
    weights = load_file(small_mixtral / "model.safetensors")
    assert [one["name"] for one in found["projections"]] == NAMES
    along, squares = 0.0, 0.0
    for one in found["projections"]:
        name = one["name"]
        weight = merged.get_parameter(name)
        after, trained_on = bnb.dequantize_4bit(weight.data, weight.quant_state), nf4_values(weights[name])
        added = update(folder, name, trained_on)
        want = projected(after, nf4_values(trained_on), added)
        assert one["formats"]["nf4"]["kept"] == pytest.approx(want, abs=2e-3), name
        along, squares = along + want * float((added**2).sum()), squares + float((added**2).sum())
        assert one["relative"] == pytest.approx(float(added.norm() / trained_on.double().norm()), rel=1e-4)
    assert found["formats"]["nf4"]["kept"] == pytest.approx(along / squares, abs=1e-3)
    assert found["lowest"]["nf4"] == min(one["formats"]["nf4"]["kept"] for one in found["projections"])
    assert found["formats"]["nf4"]["kept"] < 0.6
    assert found["formats"]["bf16"]["kept"] > 0.99


@pytest.mark.parametrize("attention", ["nf4", "16bit"])
def test_16_bits_round_as_numpy_rounds(small_mixtral: Path, adapters: dict[str, Path], attention: str) -> None:
    """With a 16-bit attention the weights lie on bfloat16's grid, and an update below half a step is lost."""
    folder, scales = adapters[attention], (0.003, 0.0003)
    options = [word for scale in scales for word in ("--scale-to", scale)]
    as_trained, *found = survives(folder, *options)
    assert as_trained["scale"] is None
    weights = load_file(small_mixtral / "model.safetensors")
    for scale, made in zip(scales, found, strict=True):
        assert made["scale"] == scale
        assert made["relative"] == pytest.approx(scale, rel=1e-6)
        for one in made["projections"]:
            weight = weights[one["name"]].float() if attention == "16bit" else nf4_values(weights[one["name"]])
            added = update(folder, one["name"], weight)
            added *= scale * weight.double().norm() / added.norm()
            w, u = weight.double().numpy(), added.numpy()
            for format, rounded in (("bf16", bfloat16), ("fp16", lambda x: x.astype(np.float16).astype(np.float64))):
                along = ((rounded(w + u) - rounded(w)) * u).sum() / (u * u).sum()
                noise = np.linalg.norm(rounded(w + u) - (w + u)) / np.linalg.norm(u)
                kept = one["formats"][format]
                assert kept["kept"] == pytest.approx(along, abs=2e-3), (one["name"], format)
                assert kept["error"] == pytest.approx(noise, rel=2e-3), (one["name"], format)
    lost = found[1]["formats"]["bf16"]["kept"]
    assert lost < 0.9 if attention == "16bit" else lost > 0.9


def test_a_non_moe_tuning_counts_in_16_bits(small_mixtral: Path, tmp_path: Path) -> None:
    tuned_non_moe(small_mixtral, tmp_path / "adapter", router=True)
    (found,) = survives(tmp_path / "adapter")
    formats = {one["name"]: set(one["formats"]) for one in found["projections"]}
    assert formats["model.layers.0.mlp.gate.weight"] == {"bf16", "fp16"}
    assert formats["model.norm.weight"] == {"bf16", "fp16"}
    assert formats[NAMES[0]] == {"nf4", "bf16", "fp16"}
    assert found["formats"]["bf16"]["kept"] > 0.99


def test_a_small_update_is_warned_of(adapters: dict[str, Path]) -> None:
    ran = run_finetune("evaluate", adapters["nf4"], "--survival", "--scale-to", 0.1)
    assert ran.status == 0, ran.stderr
    assert "Share of the update that is left" in ran.stdout
    (warning,) = [line for line in ran.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: nf4 keeps ")
    assert "`finetune merge --format nf4` keeps it in bf16" in warning
    kept = {"nf4": Kept(0.95, 0.5), "bf16": Kept(0.4, 3.0), "fp16": Kept(0.8, 0.7)}
    assert lost_in(Survival(None, 0.0005, kept, {}, ())) == [
        "bf16 keeps 40% of the update (0.05% of the weights' norm; the rounding's error is 3.0 times the update): "
        "serve the adapter itself, or merge with --format fp16",
        "fp16 keeps 80% of the update (0.05% of the weights' norm; the rounding's error is 0.7 times the update): "
        "serve the adapter itself",
    ]
