"""GGUF merges: the `gguf` package reads back what was merged, rotated as llama.cpp rotates, tokenized as it tokenizes.

llama.cpp itself is not here: scripts/check_gguf.sh builds it and compares greedy tokens.
"""

from __future__ import annotations

import heapq
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import jinja2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, rotate_half

from finetune.errors import ModelError
from finetune.export.gguf import heads_in_pairs
from finetune.export.gguf_config import (
    describe_config,
    require_written,
    rope_divisors,
    spm_tokens,
    without_generation_tags,
)
from finetune.moe.arch import MoeArch
from tests.conftest import REPOSITORY, TOKENIZER_FILES
from tests.export.tunings import tuned
from tests.models import tiny_model
from tests.running import refused, run_finetune

TINY = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
HEADS, KV_HEADS, EXPERTS = 4, 2, 4


@pytest.fixture(scope="module")
def adapter(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "adapter"
    tuned(small_mixtral, folder)
    return folder


@pytest.fixture(scope="module")
def fp16(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The same merge as an fp16 checkpoint, which has tests of its own."""
    folder = tmp_path_factory.mktemp("fp16") / "merged"
    assert run_finetune("merge", adapter, "--output", folder, "--format", "fp16").status == 0
    return load_file(folder / "model.safetensors")


def read(folder: Path) -> gguf.GGUFReader:
    (file,) = folder.glob("*.gguf")
    return gguf.GGUFReader(file)


def expected_tensors(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """llama.cpp's tensors of a checkpoint, worked out from its description of them."""
    expected = {
        "token_embd.weight": checkpoint["model.embed_tokens.weight"],
        "output_norm.weight": checkpoint["model.norm.weight"],
    }
    for layer in range(2):
        path, block = f"model.layers.{layer}", f"blk.{layer}"
        for ours, theirs in (("v", "v"), ("o", "output")):
            expected[f"{block}.attn_{theirs}.weight"] = checkpoint[f"{path}.self_attn.{ours}_proj.weight"]
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            weight = checkpoint[f"{path}.self_attn.{name}_proj.weight"]
            half = weight.shape[0] // heads // 2
            rows = [head * 2 * half + part * half + n for head in range(heads) for n in range(half) for part in (0, 1)]
            expected[f"{block}.attn_{name}.weight"] = weight[rows]
        expected[f"{block}.attn_norm.weight"] = checkpoint[f"{path}.input_layernorm.weight"]
        expected[f"{block}.ffn_norm.weight"] = checkpoint[f"{path}.post_attention_layernorm.weight"]
        expected[f"{block}.ffn_gate_inp.weight"] = checkpoint[f"{path}.block_sparse_moe.gate.weight"]
        for number, name in ((1, "gate"), (3, "up"), (2, "down")):
            each = [checkpoint[f"{path}.block_sparse_moe.experts.{e}.w{number}.weight"] for e in range(EXPERTS)]
            expected[f"{block}.ffn_{name}_exps.weight"] = torch.stack(each)
    return expected


def test_f16_holds_the_merged_weights_under_llama_cpps_names(
    adapter: Path, fp16: dict[str, Tensor], tmp_path: Path
) -> None:
    args = ("--output", tmp_path / "merged", "--format", "gguf", "--gguf-type", "f16")
    ran = run_finetune("merge", adapter, *args, "--json")
    assert ran.status == 0, ran.stderr
    reader = read(tmp_path / "merged")
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = expected_tensors(fp16)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        data = torch.from_numpy(found[name].data.copy())
        assert data.dtype == (torch.float32 if "norm" in name or "gate_inp" in name else torch.float16), name
        assert torch.equal(data, tensor.to(data.dtype)), name
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = {key.removeprefix("llama."): value for key, value in values.items() if key.startswith("llama.")}
    assert config == {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 1e6,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "vocab_size": 32000,
    }
    assert (values["general.architecture"], values["general.file_type"]) == ("llama", gguf.LlamaFileType.MOSTLY_F16)
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert len(values["tokenizer.ggml.tokens"]) == 32000
    folder = tmp_path / "merged"
    assert sorted(file.name for file in folder.iterdir()) == [
        "Modelfile",
        "SERVING.md",
        "merge.json",
        "merged-f16.gguf",
    ]
    assert (folder / "Modelfile").read_text().startswith("FROM ./merged-f16.gguf\n")
    assert "llama-server -m merged-f16.gguf" in (folder / "SERVING.md").read_text()


def test_q8_0_is_the_nearest_of_its_levels(adapter: Path, fp16: dict[str, Tensor], tmp_path: Path) -> None:
    assert run_finetune("merge", adapter, "--output", tmp_path / "merged", "--format", "gguf").status == 0
    found = {tensor.name: tensor for tensor in read(tmp_path / "merged").tensors}
    for name, tensor in expected_tensors(fp16).items():
        kind = found[name].tensor_type
        values = torch.from_numpy(gguf.quants.dequantize(found[name].data, kind)).view(tensor.shape)
        if kind == gguf.GGMLQuantizationType.F32:
            assert torch.equal(values, tensor.float()), name
            continue
        assert kind == gguf.GGMLQuantizationType.Q8_0, name
        step = tensor.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        off = (values - tensor.float()).unflatten(-1, (-1, 32)).abs()
        # Half a step, and the rounding of fp16: of the scale 127 times, and of the values compared with.
        assert bool((off <= step * (0.5 + 127 * 2**-11 + 127 * 2**-11) + 1e-7).all()), name


def test_pairs_rotate_as_halves_do() -> None:
    """Scores by llama.cpp's rotation of neighbours on our rows are transformers' by rotating halves."""
    generator = torch.Generator().manual_seed(0)
    heads, size, width, length = 3, 16, 32, 5
    weight_q, weight_k = (torch.randn(heads * size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(length, width, generator=generator, dtype=torch.float64)
    angles = torch.arange(length).view(-1, 1, 1) * 10000.0 ** (
        -torch.arange(size // 2, dtype=torch.float64) / (size // 2)
    )

    def by_halves(weight: Tensor) -> Tensor:
        projected = (x @ weight.T).view(length, heads, size)
        twice = torch.cat([angles, angles], -1)
        return projected * twice.cos() + rotate_half(projected) * twice.sin()

    def by_pairs(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ heads_in_pairs(weight, heads).T).view(length, heads, size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    scores = [torch.einsum("qhd,khd->hqk", rotate(weight_q), rotate(weight_k)) for rotate in (by_halves, by_pairs)]
    torch.testing.assert_close(scores[0], scores[1])


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.1 * math.log(4) + 1},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def llama_cpp_angles(keys: dict[str, Any], divisors: Tensor | None) -> tuple[Tensor, float]:
    """float64 angles of position 1 and the factor on cosine and sine, as `ggml_rope_cache_init` computes them."""
    size, base = keys["rope.dimension_count"], keys["rope.freq_base"]
    pair = torch.arange(size // 2, dtype=torch.float64)
    plain = base ** (-2 * pair / size) / (1 if divisors is None else divisors.double())
    scale = 1 / keys.get("rope.scaling.factor", 1.0)
    if keys.get("rope.scaling.type", "none") != "yarn":
        return plain * scale, 1.0
    context = keys["rope.scaling.original_context_length"]
    low, high = (size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(0, math.floor(low)), min(size - 1, math.ceil(high))
    ramp = 1 - ((pair - low) / max(0.001, high - low)).clamp(0, 1)
    return plain * scale * (1 - ramp) + plain * ramp, 1 + 0.1 * math.log(1 / scale)


@pytest.mark.parametrize("kind", ROPES)
def test_llama_cpp_turns_by_the_angles_of_the_config(kind: str) -> None:
    """Its formula on what is written gives the frequencies by which transformers' model turns."""
    given = {"rope_theta": 10000.0, "rope_type": kind, **ROPES[kind]}
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    config = MixtralConfig(**sizes, max_position_embeddings=512, rope_parameters=given)
    rotary = MixtralRotaryEmbedding(config)
    fields, arch = config.to_dict(), MoeArch.from_config(config.to_dict())
    require_written(fields, config, where="base")
    writer = gguf.GGUFWriter(None, "llama")
    describe_config(writer, arch, fields, config)
    keys = {key.removeprefix("llama."): found.value for key, found in writer.kv_data[0].items()}
    angles, factor = llama_cpp_angles(keys, rope_divisors(arch, config))
    torch.testing.assert_close(angles.float(), rotary.inv_freq, rtol=1e-5, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)
    if kind != "default":
        plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        assert not torch.allclose(angles.float(), plain, rtol=1e-2), "the scaling would not be missed"


def test_llama_cpps_tokenizer_finds_the_same_tokens(tmp_path: Path) -> None:
    """Its algorithm: of all neighbours, the pair whose joined token has the highest score is joined, leftmost first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokens, scores, types = spm_tokens(json.loads((TINY / "tokenizer.json").read_text()), where="")
    ids = {token: number for number, token in enumerate(tokens)}
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(32000)))
    assert [n for n, kind in enumerate(types) if kind == 6] == [ids[f"<0x{byte:02X}>"] for byte in range(256)]
    assert (types[0], types[1], types[2]) == (2, 3, 3)
    for text in (
        "What comes after 3?",
        "naïve café — 3 × 7\n\tyes 🙂",
        "  two  spaces",
        "Donaudampfschifffahrt ist lang",
    ):
        found = _spm("▁" + text.replace(" ", "▁"), ids, scores)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text


def _spm(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """`llm_tokenizer_spm_session::tokenize` of llama.cpp."""
    pieces: list[str] = list(text)
    following = [*range(1, len(pieces)), -1]
    before = [-1, *range(len(pieces) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := pieces[left] + pieces[right]) in ids:
            heapq.heappush(queue, (-scores[ids[joined]], left, right, joined))

    for left in range(len(pieces) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if pieces[left] + pieces[right] != joined or not pieces[left] or not pieces[right] or following[left] != right:
            continue
        pieces[left], pieces[right] = joined, ""
        following[left] = following[right]
        if following[right] >= 0:
            before[following[right]] = left
        offer(before[left], left)
        offer(left, following[left])
    found: list[int] = []
    for piece in pieces:
        if piece:
            found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_a_template_without_generation_tags_writes_the_same() -> None:
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    plain = without_generation_tags(template)
    assert "generation -%}" not in plain
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": role, "content": role * 2} for role in ("system", "user", "assistant", "user")]
    rendered = jinja2.Environment().from_string(plain).render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert rendered == tokenizer.apply_chat_template(messages, tokenize=False)


# ---- refused ------------------------------------------------------------------------------------------------------


def test_what_no_gguf_can_hold_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("merge", adapter, "--output", tmp_path / "merged", "--format", "gguf", "--gguf-type")
    refused(tmp_path, *args, "q1", says=("there is no GGUF type 'q1'", "f16, q8_0, q2_k"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    missing = ("needs the package llama_cpp, which is not installed", "pip install llama-cpp-python")
    refused(tmp_path, *args, "q4_k_m", says=("the GGUF type q4_k_m " + missing[0], missing[1]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, *args, "f16", says=("the GGUF type f16 needs the package gguf", "pip install -e '.[gguf]'"))


def test_every_field_of_the_config_is_written_or_refused_by_name() -> None:
    """None is left out in silence: of MixtralConfig each is known, and another value or an unknown one is an error."""
    config = MixtralConfig(max_position_embeddings=512)
    require_written(config.to_dict(), config, where="base")
    require_written({**config.to_dict(), "sliding_window": 512}, config, where="base")
    for key, value in (
        ("sliding_window", 256),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("norm_topk_prob", False),
        ("attn_logit_softcapping", 30.0),
    ):
        with pytest.raises(ModelError, match=f"a GGUF cannot say {key}: {value!r}"):
            require_written({**config.to_dict(), key: value}, config, where="base")
    for kind, parameters in (
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"factor": 2.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}),
        ("yarn", {**ROPES["yarn"], "attention_factor": 1.0}),
        ("yarn", {**ROPES["yarn"], "beta_fast": 16}),
        ("yarn", {**ROPES["yarn"], "truncate": False}),
        ("linear", {"factor": 2.0, "partial_rotary_factor": 0.5}),
    ):
        rope = {"rope_theta": 1e4, "rope_type": kind, **parameters}
        scaled = MixtralConfig(head_dim=128, max_position_embeddings=512, rope_parameters=rope)
        with pytest.raises(ModelError, match=r"a GGUF cannot say rope_parameters\."):
            require_written(scaled.to_dict(), scaled, where="base")


def test_scaled_frequencies_stand_in_the_file(adapter: Path, small_mixtral: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter has llama3's, a tensor; the merge of what no GGUF can say is refused."""
    base = tmp_path / "base"
    shutil.copytree(small_mixtral, base)
    saved = {**json.loads((base / "config.json").read_text()), "head_dim": 16}
    saved["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "llama3", **ROPES["llama3"]}
    (base / "config.json").write_text(json.dumps(saved))
    args = ("merge", adapter, "--base", base, "--output", tmp_path / "merged", "--format", "gguf")
    ran = run_finetune(*args)
    assert ran.status == 0, ran.stderr
    (found,) = (tensor for tensor in read(tmp_path / "merged").tensors if tensor.name == "rope_freqs.weight")
    config = MixtralConfig.from_pretrained(base)
    expected = 1e4 ** (-torch.arange(0, 16, 2) / 16) / MixtralRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(torch.from_numpy(found.data.copy()), expected)
    saved["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    (base / "config.json").write_text(json.dumps(saved))
    says = ("a GGUF cannot say rope_parameters.rope_type: 'dynamic'", "default, linear, llama3, yarn", "--format bf16")
    refused(tmp_path, *args[:-3], tmp_path / "other", "--format", "gguf", says=says)


def test_other_families_and_tokenizers_are_refused(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("olmoe", dtype=torch.bfloat16, vocab_size=32000).save_pretrained(base)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, base / name)
    tuned(base, tmp_path / "adapter")
    args = ("--output", tmp_path / "merged", "--format", "gguf")
    says = ("a GGUF of a olmoe is not written here", "convert_hf_to_gguf.py")
    refused(tmp_path, "merge", tmp_path / "adapter", *args, says=says)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    saved: dict[str, Any] = json.loads((other / "tokenizer.json").read_text())
    saved["model"]["byte_fallback"] = False
    (other / "tokenizer.json").write_text(json.dumps(saved))
    says = ("the tokenizer is not of the sentencepiece kind", "BPE with byte_fallback")
    refused(tmp_path, "merge", other, *args, says=says)
