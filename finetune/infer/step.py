"""One decoding step: the next token's logits for each row of a batch, over the paged cache.

Why not the model's own forward: its modules launch some 45 kernels a layer for one token, which is more time than
reading the weights takes. Here a layer is about 14 launches, every one of fixed shape and without a host
synchronization, so that a step is one CUDA graph. The weights are those of the loaded model, in place; what the step
computes is what the model's forward computes (tested layer by layer against it).

Prompts go through the model's own forward (`prefill.py`): there the training backends are the fast way.

Shape suffixes: T rows, H hidden, O outputs side by side, P pages a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from finetune.infer.pages import PagePool
from finetune.infer.rotary import RotaryTables
from finetune.infer.weights import Adapters, Layer, read_layers
from finetune.kernels import (
    Fp16Activations,
    add_norm,
    lora_rows,
    nf4_of_linear,
    nf4_skinny_gemm,
    paged_attention,
    rope_write,
    route,
    runs_on_kernels,
    skinny_experts,
)
from finetune.moe import MoeArch


class DecodeStep:
    """The step of one loaded model, callable; see the file.

    Args:
        model: the causal LM itself, without a PEFT wrapper around it.
        adapters: names of the PEFT adapters in it that rows may choose.
        rotary: as long as the longest row.
    """

    def __init__(self, model: Any, arch: MoeArch, adapters: Sequence[str], rotary: RotaryTables):
        self.arch, self.decoder, self.head = arch, model.model, model.lm_head
        self.layers = read_layers(self.decoder, arch, adapters)
        self.cos_LD, self.sin_LD = rotary.cos_LD, rotary.sin_LD
        self.window = getattr(model.config, "sliding_window", None)
        self.clip = getattr(model.config, "clip_qkv", None)
        self.dtype = self.decoder.embed_tokens.weight.dtype

    def __call__(
        self, tokens_T: Tensor, position_T: Tensor, pages_TP: Tensor, adapter_T: Tensor, pool: PagePool
    ) -> Tensor:
        """float32 logits [T, V]; the tokens' keys and values are written to the pool.

        Args:
            tokens_T: int64, each row's newest token.
            position_T: int32, where it stands.
            pages_TP: int32, the rows' page tables.
            adapter_T: int32, 0 for the base, n for adapter n - 1.
        """
        x_TH = self.decoder.embed_tokens(tokens_T)
        delta_PSH = x_TH.new_empty(0, x_TH.shape[0], x_TH.shape[1], dtype=torch.float32)
        weight_TK = None
        base_T = torch.zeros_like(adapter_T)
        for number, layer in enumerate(self.layers):
            x_TH, rows = add_norm(x_TH, delta_PSH, weight_TK, *_norm(layer.input_norm))
            attended = self._attention(layer, number, rows, position_T, pages_TP, adapter_T, pool)
            projected = _project([layer.o], attended)
            _add_lora(projected, attended.x, layer.o_adapters, adapter_T)
            x_TH, rows = add_norm(x_TH, projected, None, *_norm(layer.post_norm))
            which_T = adapter_T if layer.gates_NEH.shape[0] > 1 else base_T
            index_TK, weight_TK = self._route(layer, number, rows, which_T)
            if layer.fetch is not None:
                index_TK = layer.fetch(index_TK)
            delta_PSH = skinny_experts(rows, index_TK, layer.gate_up, layer.down)
        _, rows = add_norm(x_TH, delta_PSH, weight_TK, *_norm(self.decoder.norm))
        return self.head(rows.x).float()

    def _route(self, layer: Layer, number: int, rows: Fp16Activations, which_T: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights; a bench replaces it by a trace of real routing."""
        return route(rows.x, layer.gates_NEH, which_T, layer.top_k, normalize=layer.normalize)

    def _attention(
        self,
        layer: Layer,
        number: int,
        rows: Fp16Activations,
        position_T: Tensor,
        pages_TP: Tensor,
        adapter_T: Tensor,
        pool: PagePool,
    ) -> Fp16Activations:
        heads, groups, dim = self.arch.heads, self.arch.kv_heads, self.arch.head_dim
        widths = (heads * dim, groups * dim, groups * dim)
        qkv_PTO = _project(layer.qkv, rows)
        _add_lora(qkv_PTO, rows.x, layer.qkv_adapters, adapter_T)
        if layer.qk_norm is not None or self.clip is not None:
            qkv_PTO = qkv_PTO.sum(0, keepdim=True)
        if layer.qk_norm is not None:
            for norm, out in zip(layer.qk_norm, qkv_PTO[0].split(widths, dim=1)[:2], strict=True):
                # Qwen3 norms each head, OLMoE the whole row: the weight says which.
                parts = out.to(self.dtype).unflatten(1, (-1, norm.get_parameter("weight").numel()))
                out.copy_(norm(parts).flatten(1))
        if self.clip is not None:
            qkv_PTO.clamp_(-self.clip, self.clip)
        k, v = pool.keys[number], pool.values[number]
        q_THD = rope_write(qkv_PTO, self.cos_LD, self.sin_LD, position_T, pages_TP, k, v, heads=heads)
        return paged_attention(q_THD, k, v, pages_TP, position_T, dim**-0.5, window=self.window)


def _norm(norm: nn.Module) -> tuple[Tensor, float]:
    return norm.get_parameter("weight"), float(norm.variance_epsilon)  # type: ignore[arg-type]


def _project(layers: Sequence[nn.Module], rows: Fp16Activations) -> Tensor:
    """float32 [P, T, O]: partial products of the layers, side by side."""
    if runs_on_kernels(rows.x) and all(isinstance(layer, Linear4bit) for layer in layers):
        return nf4_skinny_gemm(rows, [nf4_of_linear(layer) for layer in layers])  # type: ignore[arg-type]
    return torch.cat([layer(rows.x) for layer in layers], dim=1).float().unsqueeze(0)


def _add_lora(y_PTO: Tensor, x_TI: Tensor, adapters: Adapters | None, adapter_T: Tensor) -> None:
    if adapters is not None:
        a, b, magnitude, segment = adapters.a_NRI, adapters.b_NOR, adapters.magnitude_NO, adapters.segment_O
        lora_rows(y_PTO, x_TI, a, b, magnitude, segment, adapter_T)
