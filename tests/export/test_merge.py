"""The nf4 merge: byte for byte what transformers saves of a model merged in memory, the live adapter up to one bfloat16
rounding of W', and compared with it by the folder's own weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.adapter.adapter import Adapter, load
from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.errors import AdapterError
from finetune.export import merge as merging
from finetune.export.quantized import write_quantized
from finetune.infer.loading import load_models
from finetune.moe.base_spec import BaseSpec
from finetune.moe.base_weights import Tensors
from finetune.moe.load import load_base
from tests.conftest import TOKENIZER_FILES
from tests.export.in_memory import merged_weight, save_merged
from tests.export.tunings import RSLORA_SCALING, assert_rounded_once, nf4_values, tuned, tuned_non_moe, update
from tests.running import contents, refused, run_finetune


def merge(adapter: Path, output: Path, *args: object) -> dict[str, Any]:
    """The document of `finetune merge --json` to the nf4 format."""
    ran = run_finetune("merge", adapter, "--output", output, "--device", "cpu", *args, "--json")
    assert ran.status == 0, ran.stderr
    return {**ran.document, "said": ran.stderr}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_model(found: Path, expected: Path) -> None:
    """Equal names, dtypes, shapes and bits of all tensors, and an equal config.json."""
    before, after = tensors_of(expected), tensors_of(found)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(after[name], tensor), name
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()


def expert_bytes(model: Any) -> dict[str, bytes]:
    """Codes, scales, nested scales and offsets of all experts, by name."""
    named = ((name.removeprefix("base_model.model."), tensor) for name, tensor in model.named_parameters())
    return {name: tensor.numpy().tobytes() for name, tensor in named if ".experts." in name}


def hashes_by_hand(experts: dict[str, bytes]) -> dict[str, str]:
    """Of four experts a tensor: SHA-256 of each one's four fields, and of those together."""
    hashes = {}
    for name in {name.removesuffix("_packed") for name in experts if name.endswith("_packed")}:
        fields = [experts[f"{name}_{field}"] for field in ("packed", "absmax", "nested_absmax", "offset")]
        each = (b"".join(field[len(field) // 4 * n : len(field) // 4 * (n + 1)] for field in fields) for n in range(4))
        hashes[name] = hashlib.sha256("".join(hashlib.sha256(one).hexdigest() for one in each).encode()).hexdigest()
    return hashes


def assert_only_for_this_toolkit(folder: Path) -> None:
    """A process without this toolkit refuses the folder in words, by every class, and reads it once it has it."""
    program = f"""if True:
        from transformers import AutoModelForCausalLM, MixtralForCausalLM
        for loader in (AutoModelForCausalLM, MixtralForCausalLM):
            try:
                loader.from_pretrained({str(folder)!r})
            except ValueError as error:
                print(error)
        from finetune import Moe4bitConfig
        model = MixtralForCausalLM.from_pretrained({str(folder)!r}, device_map="cpu")
        print(type(model.model.layers[0].mlp.experts).__name__)
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *refusals, experts = done.stdout.splitlines()
    assert len(refusals) == 2
    for says in (
        "these weights are for moe-qlora: run `from finetune import Moe4bitConfig` before from_pretrained",
        "`finetune serve FOLDER`",
        "`finetune merge ADAPTER --format bf16`",
    ):
        assert all(says in refusal for refusal in refusals)
    assert experts == "QuantizedExperts"


# ---- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "lora"),
    [
        ("nf4", {}),
        ("nf4", {"use_rslora": True, "router": True}),
        ("nf4", {"use_dora": True}),
        ("16bit", {"use_dora": True}),
    ],
    ids=["lora", "rslora and router", "dora", "dora on 16-bit attention"],
)
def test_it_is_the_folder_of_a_merge_in_memory(
    small_mixtral: Path, tmp_path: Path, attention: str, lora: dict[str, bool]
) -> None:
    adapter = tmp_path / "adapter"
    trained = tuned(small_mixtral, adapter, attention=attention, **lora)
    merge(adapter, tmp_path / "merged")
    save_merged(trained, tmp_path / "expected")
    assert_same_model(tmp_path / "merged", tmp_path / "expected")
    # And attention is the float64 sum rounded once, by bitsandbytes' own values and the adapter's file.
    found = tensors_of(tmp_path / "merged")
    scaling = RSLORA_SCALING if lora.get("use_rslora") else 2.0
    for name, stored in load_file(small_mixtral / "model.safetensors").items():
        if "self_attn" in name:
            start = nf4_values(stored) if attention == "nf4" else stored.float()
            assert_rounded_once(found[name], start.double() + update(adapter, name, start, scaling=scaling))


@pytest.mark.parametrize(
    ("experts", "attention"), [("nf4", "nf4"), ("hqq2", "nf4"), ("hqq3", "16bit")], ids=["nf4", "hqq2", "hqq3"]
)
def test_experts_of_a_quantized_base_keep_their_bytes(
    small_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str, attention: str
) -> None:
    """Copied one expert at a time, without a model."""
    quantized, adapter = tmp_path / "quantized", tmp_path / "adapter"
    write_quantized(str(small_mixtral), quantized, attention=attention, experts=experts, device="cpu")
    trained = tuned(quantized, adapter, attention=attention)
    read, rows = Tensors.read, set()

    def watched(self: Tensors, name: str, *, row: int | None = None) -> Tensor:
        if ".experts." in name and self._infos[name].file.parent == quantized:
            rows.add(row)
        return read(self, name, row=row)

    monkeypatch.setattr(Tensors, "read", watched)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    merge(adapter, tmp_path / "merged")
    monkeypatch.undo()
    assert rows == {0, 1, 2, 3}
    before, after = tensors_of(quantized), tensors_of(tmp_path / "merged")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".experts." in name)
    save_merged(trained, tmp_path / "expected")
    assert_same_model(tmp_path / "merged", tmp_path / "expected")
    assert load(str(tmp_path / "merged"), device="cpu").base.experts == experts
    if experts != "nf4":
        says = (f"the adapter was trained on experts in {experts}, and the base is a checkpoint in 16 bits", "--base")
        refused(tmp_path, "merge", adapter, "--base", small_mixtral, "--output", tmp_path / "none", says=says)


def stored_in(dtype: torch.dtype, shape: Path, folder: Path) -> Path:
    """A checkpoint of that dtype, whose values no narrower one holds."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(shape / name, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_adapter_that_records_no_dtype_answers_as_it_is_merged(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """One default: the experts of every live load are those of the merged folder, byte for byte."""
    base, adapter = stored_in(dtype, small_mixtral, tmp_path / "base"), tmp_path / "adapter"
    shutil.copytree(saved_adapter, adapter)
    (adapter / "base.json").unlink()  # as stock PEFT leaves it
    if dtype == torch.float16:  # as an earlier release left it
        (adapter / "base.json").write_text(json.dumps({"path": str(base), "attention": "nf4"}))
    about = merge(adapter, tmp_path / "merged", "--base", base, "--rows", 0)
    assert "quantized from bfloat16; no hash in base.json proves" in about["said"]
    merged = expert_bytes(load(str(tmp_path / "merged"), device="cpu").model)
    for loaded in (
        load_models(str(adapter), {}, name=None, base=str(base), device="cpu").loaded,
        load_models(str(base), {"tuned": str(adapter)}, name=None, base=None, device="cpu").loaded,
    ):
        assert expert_bytes(loaded.model) == merged
    # And by bitsandbytes, from the checkpoint that transformers reads in bfloat16.
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    matrix = stock.get_parameter("model.layers.1.mlp.experts.down_proj")[2].contiguous()
    packed, _ = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    codes = merged["model.layers.1.mlp.experts.down_proj_packed"]
    assert codes[len(codes) // 2 : len(codes) * 3 // 4] == packed.numpy().tobytes()


def test_an_adapter_that_records_no_dtype_is_not_put_on_other_bytes(saved_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_adapter, tmp_path / "old")
    base = replace(BaseSpec.read(folder), quantizing_dtype=None)
    base.save(folder)
    adapter = Adapter.open(folder)
    adapter.require_trained_on(base)  # read as it was quantized: nothing is assumed
    adapter.require_trained_on(replace(base, quantizing_dtype="bfloat16"))
    adapter.require_trained_on(replace(base, quantizing_dtype="float32"))  # the same bytes: the base is in bfloat16
    with pytest.raises(AdapterError, match="quantized from bfloat16"):
        adapter.require_trained_on(replace(base, quantizing_dtype="float16"))
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.bfloat16)}, wide / "model.safetensors")
    with pytest.raises(AdapterError, match="quantized from bfloat16") as caught:
        adapter.require_trained_on(replace(base, path=str(wide), quantizing_dtype="float32"))
    assert "base.json does not record the dtype, which is then bfloat16" in str(caught.value)
    assert "adapters trained with the attention in nf4, quantized from float32, as here" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_experts_keep_the_bytes_of_training_whatever_the_checkpoint(
    small_mixtral: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Trained on a CPU in float32: the adapter records it, a merge follows it, and so does a load in another dtype."""
    base, adapter = stored_in(dtype, small_mixtral, tmp_path / "base"), tmp_path / "adapter"
    trained = tuned(base, adapter)
    assert BaseSpec.read(adapter).quantizing_dtype == "float32"
    bytes_of_training = expert_bytes(trained.model)
    assert BaseSpec.read(adapter).experts_sha256 == hashes_by_hand(bytes_of_training)
    about = merge(adapter, tmp_path / "merged")
    assert about["experts_proven"]
    assert "Experts: those that were trained, byte for byte" in about["said"]
    merged = load(str(tmp_path / "merged"), device="cpu")
    assert expert_bytes(merged.model) == bytes_of_training
    assert merged.base.quantizing_dtype is None, "read as they are"
    if dtype == torch.bfloat16:
        assert_only_for_this_toolkit(tmp_path / "merged")
    again = load(str(adapter), device="cpu", dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16
    assert expert_bytes(again.model) == bytes_of_training
    # What was trained in bfloat16 stays that in float32: experts, 4-bit attention, and what is not quantized.
    coarse = replace(BaseSpec.read(adapter), quantizing_dtype="bfloat16")
    narrow, wide = (load_base(coarse, device="cpu", dtype=name) for name in ("bfloat16", "float32"))
    assert (expert_bytes(narrow.model) == bytes_of_training) == (dtype == torch.bfloat16)
    assert wide.model.dtype == torch.float32
    for (name, stored), (_, same) in zip(narrow.model.named_parameters(), wide.model.named_parameters(), strict=True):
        assert torch.equal(stored.to(same.dtype), same), name


@pytest.mark.parametrize("format", ["nf4", "bf16", "gguf"])
def test_experts_that_were_not_trained_are_not_written(small_mixtral: Path, tmp_path: Path, format: str) -> None:
    """One weight of the base has changed since: the hash over all experts' bytes finds it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(small_mixtral, base)
    tuned(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 5] = 0.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    says = ("not those that the adapter was trained on: 1 of 4 differ", "model.layers.1.mlp.experts.down_proj")
    refused(tmp_path, "merge", adapter, "--output", tmp_path / "merged", "--format", format, says=says)


def test_a_faulty_folder_shows_in_the_comparison(
    small_mixtral: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared lies on the disk, experts too: here others' than those that were written."""
    adapter = tmp_path / "adapter"
    tuned(small_mixtral, adapter)
    args = ("--data", conversations, "--rows", 2)
    right = merge(adapter, tmp_path / "right", *args)["fidelity"]
    write = merging.write_folder

    def write_wrong(source: Any, output: Path, **kwargs: Any) -> dict[str, Any]:
        about = write(source, output, **kwargs)
        tensors = load_file(output / "model.safetensors")
        tensors["model.layers.1.mlp.experts.down_proj_packed"] ^= 0x88
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        return about

    monkeypatch.setattr(merging, "write_folder", write_wrong)
    wrong = merge(adapter, tmp_path / "wrong", *args)["fidelity"]
    assert wrong["kl"] > 20 * right["kl"], (wrong["kl"], right["kl"])


def test_attention_is_rounded_finer_where_asked(small_mixtral: Path, tmp_path: Path) -> None:
    """To float16, once; all else is as without."""
    adapter = tmp_path / "adapter"
    tuned(small_mixtral, adapter)
    merge(adapter, tmp_path / "bf16")
    assert merge(adapter, tmp_path / "fp16", "--attention", "fp16")["attention"] == "fp16"
    coarse, fine = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "fp16")
    assert fine.keys() == coarse.keys()
    assert all(torch.equal(fine[name], tensor) for name, tensor in coarse.items() if "self_attn" not in name)
    for name, stored in load_file(small_mixtral / "model.safetensors").items():
        if "self_attn" in name:
            start = nf4_values(stored)
            assert fine[name].dtype == torch.float16
            assert_rounded_once(fine[name], start.double() + update(adapter, name, start))
    refused(tmp_path, "merge", adapter, "--output", tmp_path / "no", "--attention", "nf4", says=("bf16, fp16",))


def test_a_non_moe_tuning_is_rounded_once(small_mixtral: Path, tmp_path: Path) -> None:
    trained = tuned_non_moe(small_mixtral, tmp_path / "adapter", router=True)
    tuning = {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    assert merge(tmp_path / "adapter", tmp_path / "merged")["fidelity"] is None
    after = tensors_of(tmp_path / "merged")
    for name, parameter in tuning.items():
        assert torch.equal(after[name], parameter.to(torch.bfloat16)), name
    save_merged(trained, tmp_path / "expected")
    assert_same_model(tmp_path / "merged", tmp_path / "expected")


def test_adapters_add_up_in_shards(small_mixtral: Path, tmp_path: Path) -> None:
    """The sum is that of the bf16 format, which is held to float64; experts are those of one adapter."""
    first, second = tmp_path / "first", tmp_path / "second"
    tuned(small_mixtral, first)
    tuned(small_mixtral, second, use_dora=True, seed=5)
    args = ("--factor", 0.7, "--with", f"{second}=-0.5", "--shard-size", "50KB")
    about = merge(first, tmp_path / "merged", *args)
    assert about["fidelity"] is None
    assert (
        "Not compared with the live adapter: it is not one adapter as it was trained; `finetune evaluate"
        in (about["said"])
    )
    assert run_finetune("merge", first, "--output", tmp_path / "bf16", "--format", "bf16", *args).status == 0
    merge(first, tmp_path / "one")
    found, summed, one = (tensors_of(tmp_path / name) for name in ("merged", "bf16", "one"))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        hub = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        assert torch.equal(tensor, (one if ".experts." in name else summed)[name if ".experts." in name else hub]), name
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(about["files"]) > 2
    held = {name: file for file in about["files"] for name in load_file(tmp_path / "merged" / file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    load(str(tmp_path / "merged"), device="cpu")
    serving = (tmp_path / "merged" / "SERVING.md").read_text()
    assert f"- 0.7 x `{first}` (lora)" in serving
    assert "`finetune serve ./merged`" in serving


# ---- compared with the live adapter -------------------------------------------------------------------------------


def test_merged_folder_computes_what_the_live_adapter_computes(small_mixtral: Path, tmp_path: Path) -> None:
    trained = tuned(small_mixtral, tmp_path / "adapter", use_dora=True)
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained.model(ids).logits
        without = {name: merged_weight(m) for name, m in trained.model.named_modules() if isinstance(m, LoraLayer)}
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        found = merged(ids).logits
        # One rounding of W': put the rounded weights' unrounded originals back, and only summation order is left.
        for name, weight in without.items():
            parameter = merged.get_parameter(name.removeprefix("base_model.model.") + ".weight")
            assert torch.equal(parameter, weight.to(torch.bfloat16).float())
            parameter.data = weight
        unrounded = merged(ids).logits
    # Measured: 3e-7 unrounded, 1e-3 with bf16 W', logits of about 0.5.
    torch.testing.assert_close(unrounded, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["lora and router", "non-MoE"])
def test_fidelity_equals_brute_force(small_mixtral: Path, conversations: Path, tmp_path: Path, kind: str) -> None:
    """Against two full models run apart, with transformers' own loss and router logits."""
    if kind == "non-MoE":
        trained = tuned_non_moe(small_mixtral, tmp_path / "adapter", router=True)
    else:
        trained = tuned(small_mixtral, tmp_path / "adapter", scale=0.3, router=True)
    report = merge(tmp_path / "adapter", tmp_path / "merged", "--data", conversations, "--rows", 2)["fidelity"]
    merged = load(str(tmp_path / "merged"), device="cpu")
    rows = list(
        encode_source(Reading(Source(str(conversations), max_rows=2)), trained.tokenizer, Supervision()).dataset
    )
    kl, agree, overlap, nll, tokens, supervised = 0.0, 0, 0, 0.0, 0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            a, b = (m.model(input_ids=ids, labels=labels, output_router_logits=True) for m in (trained, merged))
        p, q = (out.logits[0].double().log_softmax(-1) for out in (a, b))
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        for x, y in zip(a.router_logits, b.router_logits, strict=True):
            for one, other in zip(x.topk(2).indices.tolist(), y.topk(2).indices.tolist(), strict=True):
                overlap += len(set(one) & set(other))
        targets = labels[0, 1:]
        nll += sum(-float(p[i, t]) for i, t in enumerate(targets.tolist()) if t != -100)
        tokens, supervised = tokens + ids.numel(), supervised + int((targets != -100).sum())
    assert (report["tokens"], report["supervised_tokens"]) == (tokens, supervised)
    assert report["kl"] == pytest.approx(kl / tokens, rel=1e-2, abs=1e-8)
    assert report["greedy_agreement"] == agree / tokens
    assert report["top_k_overlap"] == overlap / (tokens * 2 * 2)
    assert report["reference_loss"] == pytest.approx(nll / supervised, rel=1e-5)
    saved = json.loads((tmp_path / "merged" / "fidelity.json").read_text())
    assert saved["fidelity"] == report
    assert saved["held_out"] == str(conversations)


def test_a_comparison_that_is_cut_off_leaves_the_merged_model(
    small_mixtral: Path, saved_adapter: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "fidelity_between", cut)
    args = ("--data", conversations, "--rows", 1)
    assert run_finetune("merge", saved_adapter, "--output", tmp_path / "merged", *args, "--device", "cpu").status == 130
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    merge(saved_adapter, tmp_path / "whole", "--rows", 0)
    found, whole = contents(tmp_path / "merged"), contents(tmp_path / "whole")
    assert found.keys() == whole.keys()
    for name in found.keys() - {"SERVING.md"}:  # which names the folder
        assert found[name] == whole[name], name


def test_conversations_are_read_before_anything_is_written(
    saved_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "write_folder", None)
    (tmp_path / "rows.jsonl").write_text('{"unknown": 3}\n')
    args = ("merge", saved_adapter, "--output", tmp_path / "merged")
    refused(tmp_path, *args, "--data", tmp_path / "rows.jsonl", "--device", "cpu", says=("rows.jsonl",))
    says = ("--data does not go with --with or --factor", "finetune evaluate ADAPTER --compare OUTPUT --data DATA")
    refused(tmp_path, *args, "--data", "x", "--factor", 0.5, says=says)
    refused(tmp_path, *args, "--data", "x", "--with", saved_adapter, says=says)


def test_generate_streams_the_same_greedy_tokens(small_mixtral: Path, tmp_path: Path) -> None:
    """The command's answer equals an argmax loop over the live adapter's logits, and what it streamed."""
    live = tuned(small_mixtral, tmp_path / "adapter", scale=0.3)
    message = [{"role": "user", "content": "What comes after 3?"}]
    ids = list(live.tokenizer.apply_chat_template(message, return_dict=True)["input_ids"])
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(live.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = live.tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()
    args = ("generate", tmp_path / "adapter", "--prompt", "What comes after 3?", "--max-new-tokens", 6)
    ran = run_finetune(*args, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["answers"] == [
        {"prompt": "What comes after 3?", "text": expected, "prompt_tokens": prompt, "completion_tokens": 6}
    ]
    assert run_finetune(*args).stdout.strip() == expected
