"""16-bit merges: every weight is the float64 sum rounded once, every reader gets the layout of the hub, and what cannot
be merged is refused with nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.export.formats import plain_config
from finetune.export.quantized import write_quantized
from finetune.kernels.nf4 import Nf4Weights, dequantize_reference
from finetune.kernels.packed_experts import unpack
from finetune.moe.load import LoadedModel
from tests.conftest import REPOSITORY, TOKENIZER_FILES
from tests.export.in_memory import merged_weight
from tests.export.tunings import RSLORA_SCALING, assert_rounded_once, nf4_values, tuned, tuned_non_moe, update
from tests.models import FAMILIES, tiny_model
from tests.running import Ran, refused, run_finetune


def merged_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merge(*args: object, status: int = 0) -> Ran:
    ran = run_finetune("merge", *args)
    assert ran.status == status, ran.stderr
    return ran


def live_weights(live: LoadedModel) -> dict[str, Tensor]:
    """What a live adapter computes with, in float32, by transformers' names: merged attention and decoded experts."""
    weights = {}
    for name, module in live.model.named_modules():
        path = name.removeprefix("base_model.model.")
        if isinstance(module, LoraLayer):
            weights[f"{path}.weight"] = merged_weight(module).detach()
        elif path.endswith(".experts"):
            for projection in ("gate_up_proj", "down_proj"):
                stack = Nf4Weights(*(module.get_parameter(f"{projection}_{field}") for field in Nf4Weights._fields))
                weights[f"{path}.{projection}"] = dequantize_reference(stack, torch.float32)
    return weights


def transformers_name(hub: str) -> str:
    return hub.replace("block_sparse_moe.gate", "mlp.gate")


# ---- the weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "lora"),
    [("nf4", {}), ("16bit", {"use_rslora": True}), ("nf4", {"use_dora": True}), ("nf4", {"router": True})],
    ids=["lora", "rslora-16bit", "dora", "router"],
)
def test_every_weight_is_the_float64_sum_rounded_once(
    small_mixtral: Path, tmp_path: Path, attention: str, lora: dict[str, bool]
) -> None:
    adapter = tmp_path / "adapter"
    tuned(small_mixtral, adapter, attention=attention, **lora)
    merge(adapter, "--output", tmp_path / "merged", "--format", "bf16")
    base, found = merged_tensors(small_mixtral), merged_tensors(tmp_path / "merged")
    assert found.keys() == base.keys()
    scaling = RSLORA_SCALING if lora.get("use_rslora") else 2.0
    for name, tensor in base.items():
        if ".experts." in name:
            continue
        start = nf4_values(tensor) if attention == "nf4" and "self_attn" in name else tensor
        expected = start.double() + update(adapter, transformers_name(name), start, scaling=scaling)
        assert_rounded_once(found[name], expected)
        assert torch.equal(found[name], tensor) == (
            "self_attn" not in name and not ("gate" in name and "router" in lora)
        )
    for layer in range(2):
        for expert in range(4):
            names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{n}.weight" for n in (1, 3, 2)]
            gate_up = nf4_values(torch.cat([base[names[0]], base[names[1]]])).to(torch.bfloat16)
            assert torch.equal(torch.cat([found[names[0]], found[names[1]]]), gate_up)
            assert torch.equal(found[names[2]], nf4_values(base[names[2]]).to(torch.bfloat16))


def test_attention_equals_the_nf4_merge_bit_for_bit(small_mixtral: Path, tmp_path: Path) -> None:
    tuned(small_mixtral, tmp_path / "adapter")
    merge(tmp_path / "adapter", "--output", tmp_path / "bf16", "--format", "bf16")
    merge(tmp_path / "adapter", "--output", tmp_path / "nf4", "--format", "nf4")
    found, exact = merged_tensors(tmp_path / "bf16"), merged_tensors(tmp_path / "nf4")
    shared = found.keys() & exact.keys()
    assert sum("self_attn" in name for name in shared) == 8
    for name in shared:
        assert torch.equal(found[name], exact[name]), name


def test_adapters_add_up_with_their_factors(small_mixtral: Path, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{}, {"use_dora": True, "seed": 5}, {"router": True, "seed": 6}]
    folders = [tmp_path / f"adapter{n}" for n in range(3)]
    for folder, kind in zip(folders, kinds, strict=True):
        tuned(small_mixtral, folder, **kind)
    others = ("--with", f"{folders[1]}=0.5", "--with", f"{folders[2]}=-1.5")
    merge(folders[0], "--factor", 0.7, *others, "--output", tmp_path / "merged", "--format", "bf16")
    base, found = merged_tensors(small_mixtral), merged_tensors(tmp_path / "merged")
    for name, tensor in base.items():
        if "self_attn" in name or "gate" in name:
            start = nf4_values(tensor) if "self_attn" in name else tensor.float()
            updates = (update(folder, transformers_name(name), start) for folder in folders)
            factors = (0.7, 0.5, -1.5)
            expected = start.double() + sum(f * u for f, u in zip(factors, updates, strict=True))
            assert_rounded_once(found[name], expected)
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [adapter["factor"] for adapter in about["adapters"]] == [0.7, 0.5, -1.5]


def test_onto_the_original_adds_to_the_16_bit_weights(small_mixtral: Path, tmp_path: Path) -> None:
    """Also where the base that was trained is a quantized folder: then the original is named, or it is refused."""
    adapter, quantized = tmp_path / "adapter", tmp_path / "quantized"
    write_quantized(str(small_mixtral), quantized, device="cpu")
    tuned(quantized, adapter)
    args = (adapter, "--format", "bf16", "--onto", "original", "--output", tmp_path / "merged")
    refused(
        tmp_path,
        "merge",
        *args,
        says=("there is no 16-bit original to merge onto: the base is a quantized folder", "--original PATH"),
    )
    merge(*args, "--original", small_mixtral)
    base, found = merged_tensors(small_mixtral), merged_tensors(tmp_path / "merged")
    for name, tensor in base.items():
        expected = tensor.double() + (0 if ".experts." in name else update(adapter, transformers_name(name), tensor))
        assert_rounded_once(found[name], expected)
        assert torch.equal(found[name], tensor) == ("self_attn" not in name)
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (about["onto"], about["experts"], about["base"]) == ("original", "original", str(small_mixtral))
    assert "--onto original" in (tmp_path / "merged" / "SERVING.md").read_text()


def test_every_layout_of_the_base_gives_the_same_files(small_mixtral: Path, tmp_path: Path) -> None:
    """The hub's, transformers' fused one, and a folder that holds NF4."""
    tuned(small_mixtral, tmp_path / "adapter")
    fused, quantized = tmp_path / "fused", tmp_path / "quantized"
    shutil.copytree(small_mixtral, fused)
    model = AutoModelForCausalLM.from_pretrained(small_mixtral, dtype=torch.bfloat16)
    save_file(dict(model.named_parameters()), fused / "model.safetensors", metadata={"format": "pt"})
    write_quantized(str(small_mixtral), quantized, device="cpu")
    made = []
    for number, base in enumerate((small_mixtral, fused, quantized)):
        output = tmp_path / f"merged{number}"
        merge(tmp_path / "adapter", "--output", output, "--format", "bf16", "--base", base)
        made.append((output / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_experts_in_fewer_bits_are_decoded(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    """An adapter that was trained on NF4, merged onto the folder that it is served on."""
    low = tmp_path / "low"
    write_quantized(str(small_mixtral), low, experts="hqq3", device="cpu")
    merge(saved_adapter, "--output", tmp_path / "merged", "--format", "fp16", "--base", low)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["experts"] == "hqq3"
    stored, found = merged_tensors(low), merged_tensors(tmp_path / "merged")
    for expert in range(4):
        affine = stored["model.layers.1.mlp.experts.down_proj_affine"][expert].double()
        codes = unpack(stored["model.layers.1.mlp.experts.down_proj_packed"][expert], 128).double()
        expected = ((codes - affine[..., 1:]) * affine[..., :1]).flatten(1)
        assert_rounded_once(found[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"], expected)


def test_non_moe_tuning_is_rounded_once(small_mixtral: Path, tmp_path: Path) -> None:
    loaded = tuned_non_moe(small_mixtral, tmp_path / "adapter", router=True)
    merge(tmp_path / "adapter", "--output", tmp_path / "merged", "--format", "fp16")
    found = {transformers_name(name): tensor for name, tensor in merged_tensors(tmp_path / "merged").items()}
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name], parameter.detach().to(torch.float16)), name


# ---- the readers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "mixtral")]
)
def test_transformers_computes_what_the_live_adapter_computes(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = tiny_model(family, dtype=torch.bfloat16, vocab_size=32000, tie_word_embeddings=True)
    model.save_pretrained(base)
    for name in TOKENIZER_FILES:
        shutil.copy(REPOSITORY / "recipes" / "tiny-mixtral" / "model" / name, base / name)
    live = tuned(base, tmp_path / "adapter")
    args = ("--output", tmp_path / "merged", "--format", "bf16", "--shard-size", "1MB")
    about = merge(tmp_path / "adapter", *args, "--json").document
    assert len(about["files"]) > 2
    serving = (tmp_path / "merged" / "SERVING.md").read_text()
    for command in ("vllm serve ./merged", "--model-path ./merged", "--model-id ./merged", "finetune serve ./merged"):
        assert command in serving
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    # The layout is the hub's: transformers writes the same names from its own model.
    assert merged_tensors(tmp_path / "merged").keys() == merged_tensors(base).keys()
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, unrounded in live_weights(live).items():
            weight = merged.get_parameter(name)
            assert torch.equal(weight, unrounded.to(torch.bfloat16).float()), name
            weight.data = unrounded
        # Weights rounded to bf16 can send a token to another expert. Unrounded, only the order of sums is left.
        torch.testing.assert_close(merged(ids).logits, live.model(ids).logits, rtol=0, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    message = [{"role": "user", "content": "What comes after 3?"}]
    assert tokenizer.apply_chat_template(message) == live.tokenizer.apply_chat_template(message)


def test_shards_hold_what_the_index_says(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    merge(saved_adapter, "--output", tmp_path / "merged", "--format", "bf16", "--shard-size", "100KB")
    files = sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    held = {name: file for file in files for name in load_file(tmp_path / "merged" / file)}
    assert held == index["weight_map"]
    total = sum(tensor.nbytes for tensor in merged_tensors(tmp_path / "merged").values())
    assert index["metadata"]["total_size"] == total
    # One tensor above the limit has a file of its own: the embedding.
    big = [file for file in files if (tmp_path / "merged" / file).stat().st_size > 100_000 + 4096]
    assert [list(load_file(tmp_path / "merged" / file)) for file in big] == [["model.embed_tokens.weight"]]


def test_the_config_has_the_keys_of_earlier_readers() -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    config = plain_config({"rope_parameters": scaled, "vocab_size": 3}, "bf16")
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    hub = {"rope_theta": 1e6, "torch_dtype": "float32"}
    assert plain_config(hub, "fp16") == {"rope_theta": 1e6, "dtype": "float16", "torch_dtype": "float16"}


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--format", "int8"), ("--format 'int8' does not exist", "nf4, bf16, fp16, gguf")),
        (("--onto", "best"), ("--onto 'best' does not exist", "trained, original")),
        (("--format", "bf16", "--data", "x"), ("--data does not go with --format bf16", "allowed: --format nf4")),
        (("--onto", "original"), ("--onto original does not go with --format nf4", "--format bf16 or fp16 or gguf")),
        (("--format", "fp16", "--gguf-type", "q8_0"), ("--gguf-type does not go with --format fp16",)),
        (("--format", "bf16", "--shard-size", "4 parsecs"), ("'4 parsecs' is not a size", "give a size like 4GB")),
        (("--format", "bf16", "--shard-size", f"{'9' * 400}GB"), ("is not a size", "give a size like 4GB")),
        (("--format", "bf16", "--with", "B=much"), ("'much' is not a factor", "where: --with B=much")),
        (("--format", "bf16", "--with", "nowhere"), ("there is no adapter to merge", "where: nowhere")),
        (("--format", "bf16", "--original", "x"), ("--original names a checkpoint that is not merged onto",)),
    ],
)
def test_options_that_do_not_fit_are_refused(
    saved_adapter: Path, tmp_path: Path, args: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused(tmp_path, "merge", saved_adapter, "--output", tmp_path / "merged", *args, says=says)


def test_adapters_of_different_bases_are_refused(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved_adapter, other)
    about = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps({**about, "attention": "16bit"}))
    args = ("merge", saved_adapter, "--with", other, "--output", tmp_path / "merged", "--format", "bf16")
    refused(tmp_path, *args, says=("trained with the attention in 16bit", "trained with the attention in nf4"))
    refused(
        tmp_path,
        *("merge", saved_adapter, "--output", tmp_path / "merged", "--format", "bf16"),
        *("--base", REPOSITORY / "recipes" / "tiny-mixtral" / "model"),
        says=("the adapter was trained on another base: the routers differ",),
    )


def test_a_damaged_base_is_refused(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_mixtral, base)
    tensors = merged_tensors(base)
    args = ("merge", saved_adapter, "--output", tmp_path / "merged", "--format", "bf16", "--base", base)
    norm = "model.norm.weight"
    save_file({name: t for name, t in tensors.items() if name != norm}, base / "model.safetensors")
    refused(tmp_path, *args, says=("1 weight is missing from the checkpoint", norm))
    save_file({**tensors, norm: tensors[norm][:32].clone()}, base / "model.safetensors")
    refused(
        tmp_path,
        *args,
        says=("1 of them have another shape", f"{norm} is [32] in model.safetensors, the config says [64]"),
    )
    save_file({**tensors, norm: tensors[norm].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    refused(tmp_path, *args, says=(f"{norm} has the dtype F8_E4M3", "allowed: BF16, F16, F32, U8"))


def test_values_that_float16_cannot_hold_are_refused(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_mixtral, base)
    tensors = merged_tensors(base)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    args = ("merge", saved_adapter, "--output", tmp_path / "merged", "--base", base)
    says = ("a weight is too large for float16", "where: model.norm.weight", "merge to bf16, whose range is float32's")
    refused(tmp_path, *args, "--format", "fp16", says=says)


def test_an_adapter_that_diverged_is_refused(saved_adapter: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(saved_adapter, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    args = ("merge", adapter, "--output", tmp_path / "merged", "--format", "bf16")
    refused(tmp_path, *args, says=("a merged weight is not finite", "where: model.layers.0.self_attn.q_proj.weight"))
