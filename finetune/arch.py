"""What a mixture-of-experts model looks like, read from its config alone.

The only file that names transformers' parameter paths. Everything that counts parameters, estimates bytes
or finds the experts of a model asks a `MoeArch`; nothing here imports torch, so a preflight needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError

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
)


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
            ModelError: the model type is not one of `SUPPORTED_MODEL_TYPES`, not every layer is sparse, attention
                has biases, or keys are missing.
        """
        model_type = config.get("model_type")
        if model_type not in _KEYS:
            raise ModelError(
                f"model type {model_type!r} is not a mixture of experts that this toolkit quantizes",
                where=where,
                allowed=", ".join(SUPPORTED_MODEL_TYPES),
                fix="use a Mixtral, Qwen3-MoE or OLMoE checkpoint",
            )
        dense_layers = list(config.get("mlp_only_layers") or [])
        if dense_layers or config.get("decoder_sparse_step", 1) != 1:
            raise ModelError(
                f"this {model_type} mixes dense and sparse layers (mlp_only_layers={dense_layers}, "
                f"decoder_sparse_step={config.get('decoder_sparse_step', 1)})",
                where=where,
                allowed="models whose every layer holds experts",
                fix="use a checkpoint without dense layers",
            )
        if config.get("attention_bias"):
            raise ModelError(
                f"this {model_type} has biases in its attention projections",
                where=f"{where}: attention_bias",
                allowed="false",
                fix="use a checkpoint without attention biases",
            )
        experts_key, intermediate_key = _KEYS[model_type]
        # Not defaulted here: transformers' defaults differ from class to class, and every saved config has them.
        missing = [key for key in (*_COMMON_KEYS, intermediate_key) if key not in config]
        # transformers' own attribute_map lets Qwen3-MoE and OLMoE configs carry either key.
        experts = config.get(experts_key) or config.get("num_local_experts")
        if missing or not experts:
            raise ModelError(
                f"the config lacks {', '.join(missing + ([] if experts else [experts_key]))}",
                where=where,
                fix="use the config.json that belongs to the checkpoint",
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        qk_norm = {"mixtral": 0, "qwen3_moe": 2 * head_dim, "olmoe": (heads + kv_heads) * head_dim}[model_type]
        return cls(
            model_type=model_type,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config[intermediate_key],
            experts=experts,
            top_k=config["num_experts_per_tok"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
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

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through."""
        return self.total_params - self.expert_params * (self.experts - self.top_k) // self.experts

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
