"""Model and adapter folders that cannot be used, through every command that reads them: one message, status 2."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.running import refused

Write = Callable[..., Path]


# ---- model ----------------------------------------------------------------------------------------------------


def _cut_tail(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _spoil_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"\0" * 32 + content[40:])


def _spoil_dtype(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    file.write_bytes(content[:8] + content[8 : 8 + length].replace(b'"BF16"', b'"XX16"') + content[8 + length :])


def _remove_shard(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    _shard(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:5])


def _shard(folder: Path) -> None:
    """The weights in two files with an index, as a large model has them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, held in zip(files, names, strict=True):
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in zip(files, names, strict=True) for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _drop(*parts: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not all(part in name for part in parts)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _spoil(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:40])

    return damage


def _remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, ("model' does not exist", "model.path", "a hub id like", "check the path")),
        (_cut_tail, ("model.safetensors is truncated or corrupt: ", "bytes where its header places ", "again")),
        (_spoil_header, ("model.safetensors is corrupt: its header is not JSON", "download or copy the file again")),
        (_spoil_dtype, ("model.safetensors is corrupt: ", "XX16", "download or copy the file again")),
        (
            _remove("model.safetensors"),
            ("holds no safetensors weights", "model.safetensors.index.json", "download the weights as well"),
        ),
        (_remove_shard, ("1 of 2 shards are missing: model-00002-of-00002", "index.json", "copy the missing files")),
        (_cut_shard, ("model-00002-of-00002.safetensors is truncated: 5 bytes", "download or copy the file again")),
        (
            _drop("layers.1.self_attn.q_proj"),
            ("1 weight is missing from the checkpoint", "where: model.layers.1.self_attn.q_proj.weight", "download"),
        ),
        (
            _drop("layers.1.", "experts.0.w1"),
            ("1 weight is missing", "where: model.layers.1.block_sparse_moe.experts.0.w1.weight", "download"),
        ),
        (_drop("layers.1.", ".w3."), ("4 weights are missing", "layers.1.block_sparse_moe.experts.3.w3.weight")),
        (
            _edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ("already quantized with bitsandbytes", "config.json: quantization_config", "original 16-bit checkpoint"),
        ),
        (
            _edit("config.json", quantization_config={"quant_method": "moe_4bit", "attention": "16bit"}),
            ("keeps attention in 16bit, the recipe asks for nf4", "quantization.attention=16bit"),
        ),
        (
            _edit("config.json", model_type="llama"),
            ("model type 'llama' is not a mixture", "mixtral, qwen3_moe, olmoe", "use a"),
        ),
        (_spoil("config.json"), ("config.json is not valid JSON", "config.json", "copy the file again")),
        (_spoil("tokenizer.json"), ("tokenizer.json is not valid JSON", "tokenizer.json", "copy the file again")),
        (_remove_tokenizer, ("no tokenizer could be read", "put tokenizer.json and tokenizer_config.json")),
    ],
    ids=[
        "no folder",
        "truncated",
        "header",
        "dtype",
        "no weights",
        "missing shard",
        "truncated shard",
        "missing weight",
        "missing expert",
        "missing projection",
        "another quantization",
        "another storage",
        "dense",
        "config",
        "tokenizer",
        "no tokenizer",
    ],
)
def test_a_model_folder_that_cannot_be_used(
    write_recipe: Write,
    small_mixtral: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    model = shutil.copytree(small_mixtral, tmp_path / "model")
    damage(model)
    refused(tmp_path, "train", write_recipe(model={"path": str(model)}), says=says)
    refused(tmp_path, "quantize", model, "--output", tmp_path / "out", "--device", "cpu", says=says)


# ---- adapter --------------------------------------------------------------------------------------------------


def _unnamed(adapter: Path) -> None:
    _remove("base.json")(adapter)
    _edit("adapter_config.json", base_model_name_or_path=None)(adapter)


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_unnamed, ("does not say which base it was trained on: there is no base.json", "config.json", "with --base")),
        (_spoil("base.json"), ("base.json is not valid JSON", "base.json", "copy the file again")),
        (
            _edit("base.json", colour="red"),
            ("base.json does not fit: `colour` cannot be a key", "no key of this release", "newer"),
        ),
        (
            _remove("adapter_model.safetensors"),
            ("adapter_model.safetensors is missing", "holds: adapter_config", "give"),
        ),
        (_spoil("adapter_model.safetensors"), ("adapter_model.safetensors is truncated", "copy the file again")),
        (
            _edit("adapter_config.json", r=8),
            ("does not fit this model at r=8: 16 tensors of another shape", "q_proj.lora_A", "is [4, 64]", "[8, 64]"),
        ),
        (
            _edit("adapter_config.json", target_modules=["q_proj", "gate"]),
            (
                "cannot train 'gate' with LoRA: LoRA trains the attention only, a router trains in full",
                "adapter_config.json",
                "q_proj, k_proj",
            ),
        ),
        (_edit("base.json", path="/nowhere/base"), ("not where it was: /nowhere/base", "base.json", "with --base")),
        (
            _edit("base.json", fingerprint="0" * 64),
            ("trained on another base: the routers differ", "router fingerprint 000000000000 (this one has ", "load"),
        ),
    ],
    ids=["no base", "base", "base keys", "no weights", "weights", "rank", "target", "base moved", "another base"],
)
def test_an_adapter_that_does_not_fit(
    adapter: Path, tmp_path: Path, damage: Callable[[Path], None], says: tuple[str, ...]
) -> None:
    damage(adapter)
    refused(tmp_path, "merge", adapter, "--output", tmp_path / "merged", "--device", "cpu", says=says)
    refused(tmp_path, "generate", adapter, "--prompt", "Hello", "--device", "cpu", "--json", says=says)


def test_an_adapter_is_looked_at_before_its_base_is_loaded(adapter: Path, tmp_path: Path) -> None:
    _edit("base.json", path="/nowhere/base")(adapter)
    _spoil("adapter_model.safetensors")(adapter)
    says = ("adapter_model.safetensors is truncated",)
    refused(tmp_path, "generate", adapter, "--prompt", "Hello", "--device", "cpu", says=says)


def test_an_adapter_on_a_base_of_equal_shape(adapter: Path, small_mixtral: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small_mixtral, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    routers = {name: tensor.flip(0) for name, tensor in tensors.items() if "gate" in name}
    save_file({**tensors, **routers}, other / "model.safetensors", metadata={"format": "pt"})
    says = ("trained on another base: the routers differ", f"where: {other}", "router fingerprint", "base.json names")
    refused(tmp_path, "merge", adapter, "--base", other, "--output", tmp_path / "m", "--device", "cpu", says=says)


def test_nothing_to_merge(small_mixtral: Path, tmp_path: Path) -> None:
    says = (
        "there is no adapter to merge",
        str(small_mixtral),
        "the folder of a run, or of an adapter",
        "nothing to merge",
    )
    refused(tmp_path, "merge", small_mixtral, "--output", tmp_path / "merged", says=says)


def test_held_out_text_that_is_not_there(adapter: Path, tmp_path: Path) -> None:
    says = ("there is no data file 'none.jsonl'", "none.jsonl")
    refused(tmp_path, "merge", adapter, "--data", tmp_path / "none.jsonl", "--output", tmp_path / "merged", says=says)
