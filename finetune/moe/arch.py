"""What a mixture-of-experts model looks like, read from its config alone.

The only file that names transformers' parameter paths. Everything that counts parameters, estimates bytes
or finds the experts of a model asks a `MoeArch`; nothing here imports torch, so a preflight needs no model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.errors import ModelError
from finetune.values import Count, FileSchema, Number, check_object

# The fused expert parameters of a transformers >= 5 experts module, [E, out, in] each.
GATE_UP_PROJ, DOWN_PROJ = "gate_up_proj", "down_proj"
EXPERT_PROJECTIONS = (GATE_UP_PROJ, DOWN_PROJ)
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# The router of a layer, below the layer.
ROUTER = "mlp.gate"

# model_type -> (config key of the number of experts, config key of an expert's intermediate size).
_KEYS = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
}
SUPPORTED_MODEL_TYPES = tuple(_KEYS)
# model_type -> what the hub's checkpoints, which keep one matrix an expert, call a layer's MoE, and an expert's gate,
# up and down.
_HUB_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_COMMON_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
)

# Names that people ask LoRA for and do not get: names, reason, way out.
_REFUSED_TARGETS = (
    (
        {*EXPERT_PROJECTIONS, "experts", "w1", "w2", "w3", "gate_proj", "up_proj", "mlp", "block_sparse_moe"},
        "the experts are frozen in 4 bits, LoRA trains the attention only",
        "remove it",
    ),
    (
        {"gate", "router"},
        "LoRA trains the attention only, a router trains in full or not at all",
        "remove it, and set trainable.router: true to train the routers too",
    ),
    (
        {"lm_head", "head", "embed_tokens", "embeddings", "embedding"},
        "embeddings and head do not take LoRA here",
        "remove it, or train them with trainable.method: non_moe",
    ),
    (
        {"all-linear", "all_linear", "all"},
        "it would attach to the router and to the experts, which are frozen in 4 bits",
        "write target_modules: [q_proj, k_proj, v_proj, o_proj], which is all that takes LoRA here, or leave the key "
        "out; trainable.method: non_moe trains everything but the experts in full",
    ),
)

# Far beyond every model; a wrong digit is found here, and not by a loop over a billion layers.
_Few = Annotated[int, Field(gt=0, le=10_000)]
_Size = Annotated[int, Field(gt=0, le=2**24)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_TokenId = Annotated[int, Field(ge=-1, lt=2**31)]
_Dtype = Literal["float32", "float16", "bfloat16", "float64"] | None


class _RopeFile(FileSchema):
    """`rope_parameters`, or `rope_scaling` of earlier releases."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    short_factor: list[_Positive] | None = None
    long_factor: list[_Positive] | None = None
    original_max_position_embeddings: Count | None = None
    truncate: bool | None = None


class _ConfigFile(FileSchema):
    """config.json of the supported models. What must be there `from_config` says; here is what each key may be."""

    architectures: list[str] | None = None
    hidden_size: _Size
    num_hidden_layers: _Few
    num_attention_heads: _Few
    num_key_value_heads: _Few | None = None
    num_experts_per_tok: _Few
    num_local_experts: _Few | None = None
    num_experts: _Few | None = None
    vocab_size: _Size
    max_position_embeddings: Count
    intermediate_size: _Size | None = None
    moe_intermediate_size: _Size | None = None
    head_dim: Annotated[int, Field(gt=0, le=2**16, multiple_of=2)] | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-6
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    attention_dropout: _Share = 0.0
    router_jitter_noise: Number = 0.0
    router_aux_loss_coef: Number = 0.0
    clip_qkv: _Positive | None = None
    rope_theta: _Positive | None = None
    rope_parameters: _RopeFile | None = None
    rope_scaling: _RopeFile | None = None
    sliding_window: Count | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_cache: bool = True
    use_sliding_window: bool = False
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: Count = 1
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None
    pad_token_id: _TokenId | None = None
    dtype: _Dtype = None
    torch_dtype: _Dtype = None
    num_labels: _Few | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class MoeArch:
    """Shape of a decoder-only MoE. Sizes are in elements, not bytes.

    `tied` says that embedding and head share one matrix; `qk_norm` is the number of elements of the two
    attention norms of a layer (Qwen3-MoE and OLMoE have them, Mixtral does not).
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "config.json") -> MoeArch:
        """Reads the shape from a model config as a mapping (`config.to_dict()` or a parsed config.json).

        Raises:
            ModelError: the model type is not one of `SUPPORTED_MODEL_TYPES`, keys are missing or of the wrong type, not
                every layer is sparse, or attention has biases.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _KEYS:
            raise ModelError(
                f"model type {model_type!r} is not a mixture of experts that this toolkit quantizes",
                where=where,
                allowed=", ".join(SUPPORTED_MODEL_TYPES),
                fix="use a Mixtral, Qwen3-MoE or OLMoE checkpoint",
            )
        experts_key, intermediate_key = _KEYS[model_type]
        # Not defaulted here: transformers' defaults differ from class to class, and every saved config has them.
        missing = [key for key in (*_COMMON_KEYS, intermediate_key) if key not in config]
        missing += [intermediate_key] if config.get(intermediate_key, 0) is None else []
        # transformers' own attribute_map lets Qwen3-MoE and OLMoE configs carry either key.
        experts_key = experts_key if config.get(experts_key) is not None else "num_local_experts"
        if config.get(experts_key) is None:
            missing.append(_KEYS[model_type][0])
        fix = "use the config.json that belongs to the checkpoint"
        if missing:
            raise ModelError(f"the config lacks {', '.join(missing)}", where=where, fix=fix)
        checked = check_object(config, _ConfigFile, kind=ModelError, name="config.json", where=where, fix=fix)
        if checked.mlp_only_layers or checked.decoder_sparse_step != 1:
            raise ModelError(
                f"this {model_type} mixes dense and sparse layers (mlp_only_layers={checked.mlp_only_layers or []}, "
                f"decoder_sparse_step={checked.decoder_sparse_step})",
                where=where,
                allowed="models whose every layer holds experts",
                fix="use a checkpoint without dense layers",
            )
        if checked.attention_bias:
            raise ModelError(
                f"this {model_type} has biases in its attention projections",
                where=f"{where}: attention_bias",
                allowed="false",
                fix="use a checkpoint without attention biases",
            )
        heads, kv_heads = checked.num_attention_heads, checked.num_key_value_heads or checked.num_attention_heads
        head_dim = checked.head_dim or checked.hidden_size // heads
        experts, top_k = config[experts_key], checked.num_experts_per_tok
        faults = {
            f"num_attention_heads is {heads}, and num_key_value_heads {kv_heads} does not divide it": heads % kv_heads,
            f"num_experts_per_tok is {top_k}, and there are {experts} experts": top_k > experts,
            f"the heads have {head_dim} elements, and rotary embedding needs an even number": head_dim % 2
            or not head_dim,
        }
        for what, is_so in faults.items():
            if is_so:
                raise ModelError(f"config.json contradicts itself: {what}", where=where, fix=fix)
        qk_norm = {"mixtral": 0, "qwen3_moe": 2 * head_dim, "olmoe": (heads + kv_heads) * head_dim}[model_type]
        return cls(
            model_type=model_type,
            layers=checked.num_hidden_layers,
            hidden=checked.hidden_size,
            intermediate=config[intermediate_key],
            experts=experts,
            top_k=top_k,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=checked.vocab_size,
            tied=checked.tie_word_embeddings,
            qk_norm=qk_norm,
        )

    # ---- parameter counts -------------------------------------------------------------------------------

    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of q/k/v/o of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
        }

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of one expert's fused matrices; gate's rows come before up's."""
        return {GATE_UP_PROJ: (2 * self.intermediate, self.hidden), DOWN_PROJ: (self.hidden, self.intermediate)}

    def hub_expert_shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and (out, in) of every expert's matrix in the hub's checkpoints."""
        for layer in range(self.layers):
            for expert in range(self.experts):
                for projection, (out, in_) in self.expert_shapes().items():
                    names = hub_expert_names(self.model_type, layer, expert, projection)
                    yield from ((name, (out // len(names), in_)) for name in names)

    @property
    def attention_params(self) -> int:
        """Elements of q/k/v/o over all layers."""
        return self.layers * sum(o * i for o, i in self.attention_shapes().values())

    @property
    def expert_params(self) -> int:
        """Elements of all experts over all layers."""
        return self.layers * self.experts * sum(o * i for o, i in self.expert_shapes().values())

    @property
    def router_params(self) -> int:
        return self.layers * self.experts * self.hidden

    @property
    def norm_params(self) -> int:
        return self.layers * (2 * self.hidden + self.qk_norm) + self.hidden

    @property
    def embedding_params(self) -> int:
        """Elements of embedding and head; a tied matrix counts once."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def total_params(self) -> int:
        return (
            self.attention_params + self.expert_params + self.router_params + self.norm_params + self.embedding_params
        )

    def lora_params(
        self, r: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS, *, dora: bool = False, router: bool = False
    ) -> int:
        """LoRA elements: r * (in + out) a projection, `out` magnitudes more with DoRA, and the router when asked."""
        shapes = self.attention_shapes()
        a_layer = sum(r * (sum(shapes[name])) + (shapes[name][0] if dora else 0) for name in targets)
        return self.layers * a_layer + (self.router_params if router else 0)

    def non_moe_params(self, *, router: bool = False) -> int:
        """Everything but the experts: attention, norms, embeddings, head, and the router when asked."""
        return self.attention_params + self.norm_params + self.embedding_params + (self.router_params if router else 0)


def layer_path(layer: int) -> str:
    """Module path of a decoder layer inside a transformers causal LM."""
    return f"model.layers.{layer}"


def experts_path(layer: int) -> str:
    """Module path of a layer's experts inside a transformers causal LM."""
    return f"{layer_path(layer)}.mlp.experts"


def router_path(layer: int) -> str:
    """Module path of a layer's router inside a transformers causal LM."""
    return f"{layer_path(layer)}.{ROUTER}"


def hub_name(model_type: str, name: str) -> str:
    """What the hub's checkpoints call a parameter that is no expert's."""
    return name.replace(".mlp.", f".{_HUB_NAMES[model_type][0]}.")


def hub_expert_names(model_type: str, layer: int, expert: int, projection: str) -> tuple[str, ...]:
    """What the hub's checkpoints call the matrices of one expert that make up a fused projection, in order of rows."""
    moe, gate, up, down = _HUB_NAMES[model_type]
    matrices = (gate, up) if projection == GATE_UP_PROJ else (down,)
    return tuple(f"{layer_path(layer)}.{moe}.experts.{expert}.{matrix}.weight" for matrix in matrices)


def is_router(name: str) -> bool:
    """Whether a tensor, by its name, is a router's, PEFT's trained copy of one included."""
    return f".{ROUTER}." in name


def role_of(name: str) -> str:
    """Role of a tensor, by its name: experts, attention, router, norm, embedding, head, adapter or other.

    PEFT's trained copy of a router belongs to the adapter, the original beside it is the router.
    """
    if "lora_" in name or ".modules_to_save." in name:
        return "adapter"
    if ".mlp.experts." in name:
        return "experts"
    if is_router(name):
        return "router"
    if "norm" in name:
        return "norm"
    if ".self_attn." in name:
        return "attention"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "other"


@dataclass(frozen=True)
class NoLora:
    """Why a module cannot be a LoRA target, and what to do instead."""

    what: str
    fix: str


def why_no_lora(target: str) -> NoLora | None:
    """What is wrong with a name as a LoRA target; None for an attention projection."""
    if target in ATTENTION_PROJECTIONS:
        return None
    name = target.rsplit(".", 1)[-1]
    for names, reason, fix in _REFUSED_TARGETS:
        if name in names:
            return NoLora(f"cannot train {target!r} with LoRA: {reason}", fix)
    near = difflib.get_close_matches(name, ATTENTION_PROJECTIONS, n=1)
    what = f"cannot train {target[:60]!r} with LoRA: the attention has no projection of that name"
    return NoLora(what, f"did you mean {near[0]!r}?" if near else "remove it")
