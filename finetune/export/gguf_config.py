"""What a GGUF says to llama.cpp beside its tensors: a Mixtral's config and tokenizer, and the refusal of the rest.

Every field of config.json is in one of four places: written under llama.cpp's name; without a part in the arithmetic of
an answer; allowed with one value only, since llama.cpp's `llama` architecture computes just that; or refused by its
name, unknown fields too, which may change what the model computes. Rope scaling goes by transformers' own reading of
the config: linear and yarn as keys, llama3 as llama.cpp's converter has it, a tensor of what each frequency is divided
by.

The tokenizer is llama.cpp's sentencepiece kind. A tokenizer.json has merges where that kind has scores: a token's score
is minus the rank of the first merge that makes it, so the same pair is merged first.

Leaves out `dynamic` and `longrope`, whose frequencies depend on the length of the text in another way there.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune.errors import ModelError
from finetune.moe import MoeArch

ROPE_FREQS = "rope_freqs.weight"
_WRITTEN = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",  # by the tensors: a tied head is none
    "bos_token_id",  # these by the tokenizer
    "eos_token_id",
    "pad_token_id",
}
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",  # in training only
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "sliding_window": None,
}
# Type -> its parameters -> the only value that may be given; None where any is written.
_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), None
    ),
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
    },
}


def require_written(config: Mapping[str, Any], model_config: PreTrainedConfig, *, where: str) -> None:
    """Refuses a config of which a GGUF would leave out something that changes answers.

    Args:
        config: config.json as it lies on the disk.
        model_config: the same as transformers reads it.

    Raises:
        ModelError: names the field, its value, and what could be written.
    """
    for key, value in config.items():
        if key in _WRITTEN or key in _WITHOUT_EFFECT or value is None or (key in _ONLY and value == _ONLY[key]):
            continue
        if key == "sliding_window" and value >= config["max_position_embeddings"]:
            continue  # as long as any text
        raise _refused(key, value, str(_ONLY[key]).lower() if key in _ONLY else "fields that llama.cpp has", where)
    rope = model_config.rope_parameters
    kind = rope["rope_type"]
    if kind not in _ROPE:
        raise _refused("rope_parameters.rope_type", kind, ", ".join(_ROPE), where)
    for key in (key for key, only in _ROPE[kind].items() if only is None and rope.get(key) is None):
        raise _refused(f"rope_parameters.{key}", None, "a number", where)
    for key, value in rope.items():
        if key in ("rope_type", "type", "rope_theta") or value is None:
            continue
        known = key in _ROPE[kind]
        only = _ROPE[kind].get(key)
        if key == "partial_rotary_factor":
            known, only = True, 1.0
        if key == "attention_factor" and kind == "yarn":
            # As llama.cpp computes it.
            known, only = True, 0.1 * math.log(rope["factor"]) + 1.0
        if not known or (only is not None and value != only):
            allowed = f"of {kind}: {', '.join(_ROPE[kind]) or 'nothing'}" if only is None else str(only)
            raise _refused(f"rope_parameters.{key}", value, allowed, where)


def describe_config(writer: Any, arch: MoeArch, config: Mapping[str, Any], model_config: PreTrainedConfig) -> None:
    """Writes the config's fields, which `require_written` has seen, into a `gguf.GGUFWriter`."""
    import gguf

    rope = model_config.rope_parameters
    writer.add_block_count(arch.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(arch.hidden)
    writer.add_feed_forward_length(arch.intermediate)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_layer_norm_rms_eps(model_config.rms_norm_eps)
    writer.add_expert_count(arch.experts)
    writer.add_expert_used_count(arch.top_k)
    writer.add_vocab_size(arch.vocab)


def rope_divisors(arch: MoeArch, model_config: PreTrainedConfig) -> Tensor | None:
    """float32 [head_dim / 2] that llama.cpp divides the frequencies by; None where a key says it all."""
    rope = model_config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model_config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim)
    return plain / scaled


def describe_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Writes the tokenizer, with its chat template, into a `gguf.GGUFWriter`.

    Args:
        vocab: rows of the embedding.

    Raises:
        ModelError: a tokenizer of another kind.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        saved = json.loads((Path(scratch) / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, scores, types = spm_tokens(saved, where=str(tokenizer.name_or_path))
    missing = vocab - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + n}]" for n in range(missing))])
    writer.add_token_scores([*scores, *[0.0] * missing])
    writer.add_token_types([*types, *[5] * missing])
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if id is not None:
            add(id)
    # As the tokenizer itself does with a text.
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.tokenize("x")[0].startswith("▁"))
    if tokenizer.chat_template:
        writer.add_chat_template(without_generation_tags(tokenizer.chat_template))


def spm_tokens(tokenizer_json: dict[str, Any], *, where: str) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and llama.cpp's types of all tokens, in order of ids.

    Raises:
        ModelError: not a BPE with byte fallback as Llama and Mistral have it.
    """
    model = tokenizer_json["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ModelError(
            "the tokenizer is not of the sentencepiece kind that a Mixtral's GGUF holds",
            where=f"{where}: tokenizer.json",
            allowed="BPE with byte_fallback, as Mistral's",
            fix="merge with --format bf16, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )
    special = {token["id"]: bool(token["special"]) for token in tokenizer_json["added_tokens"]}
    texts = {id: text for text, id in model["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in tokenizer_json["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    tokens, scores, types = [], [], []
    for id in range(max(texts) + 1):
        text = texts.get(id, f"[PAD{id}]")
        tokens.append(text)
        scores.append(-float(ranks.get(text, len(model["merges"]) if id in texts else 0)))
        types.append(_token_type(id, text, texts, special, model.get("unk_token")))
    return tokens, scores, types


def without_generation_tags(template: str) -> str:
    """The same texts by a template that also readers without transformers' `generation` block can read.

    An empty expression in the block's place keeps what its dashes trimmed.
    """
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{{\1 '' \2}}", template)


def _token_type(id: int, text: str, texts: dict[int, str], special: dict[int, bool], unknown: str | None) -> int:
    """llama.cpp's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    if id not in texts:
        return 5
    if text == unknown:
        return 2
    if id in special:
        return 3 if special[id] else 4
    return 6 if re.fullmatch("<0x[0-9A-F]{2}>", text) else 1


def _refused(key: str, value: object, allowed: str, where: str) -> ModelError:
    return ModelError(
        f"a GGUF cannot say {key}: {value!r}, and llama.cpp would compute without it",
        where=f"{where}: config.json",
        allowed=allowed,
        fix="merge with --format bf16, which keeps the whole config.json",
    )
