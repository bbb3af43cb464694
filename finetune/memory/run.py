"""What an estimate depends on, and the item that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finetune.moe import ATTENTION_PROJECTIONS, MoeArch

GIB = 2**30
Method = Literal["attention_lora", "non_moe"]
AttentionStorage = Literal["nf4", "16bit"]
ExpertStorage = Literal["nf4", "hqq3", "hqq2"]
Backend = Literal["grouped", "loop"]
Dtype = Literal["bfloat16", "float16", "float32"]
Device = Literal["cuda", "cpu"]
Kind = Literal["weights", "training", "step", "fixed"]


@dataclass(frozen=True)
class MemoryItem:
    """One thing that occupies the device, and where its size comes from.

    `fixed` is what the process needs beside its tensors: the context, and room that fragmentation takes.
    """

    name: str
    bytes: int
    kind: Kind
    detail: str


def everything_supervised(tokens: int) -> float:
    """Where the rows are not known."""
    return 1.0


@dataclass(frozen=True)
class Run:
    """One process of a run; `dataclasses.replace` asks what would be if.

    Args:
        micro_batch: sequences of one forward and backward pass (`training.per_device_train_batch_size`).
        seq_len: tokens of a sequence (`training.max_length`).
        lora_alpha: takes no memory; advice of a smaller rank keeps alpha / r.
        supervised: share of a micro-batch's tokens, by their number, whose logits the LM head computes.
        accumulation: micro-batches of a step; of more than one, the earlier ones' gradients are there while one runs.
        router: the routers train too.
        auxiliary: the loss holds the routers' auxiliary losses (`router/auxiliary.py`).
        keep_attention: so many of the last layers keep what their attention and norms need for the backward pass.
        keep_gate_up: so many of the last layers keep their experts' gate_up output.
        resident_attention: the attention's NF4 weights that carry LoRA lie dequantized beside their NF4 form.
        dtype: of what is not quantized, and of the arithmetic.
        backend: how the experts are multiplied (`kernels/expert_operation.py`).
        fused_layers: liger-kernel's RMSNorm instead of transformers' own.
        processes: more than one adds the buckets of data-parallel gradients.
    """

    arch: MoeArch
    method: Method = "attention_lora"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    lora_dropout: bool = False
    use_dora: bool = False
    router: bool = False
    auxiliary: bool = False
    attention_storage: AttentionStorage = "nf4"
    experts_storage: ExpertStorage = "nf4"
    optimizer: str = "adamw_torch_fused"
    micro_batch: int = 1
    seq_len: int = 1024
    supervised: Callable[[int], float] = everything_supervised
    accumulation: int = 1
    keep_attention: int = 0
    keep_gate_up: int = 0
    resident_attention: bool = False
    dtype: Dtype = "bfloat16"
    backend: Backend = "grouped"
    fused_layers: bool = True
    processes: int = 1
    device: Device = "cuda"

    def __post_init__(self) -> None:
        assert self.method == "attention_lora" or self.attention_storage == "16bit", "NF4 weights cannot train"
        assert self.micro_batch > 0
        assert self.seq_len > 0
        assert 0 <= self.keep_attention <= self.arch.layers
        assert 0 <= self.keep_gate_up <= self.arch.layers

    @property
    def can_be_resident(self) -> bool:
        """Whether the fused LoRA layers, which read dequantized weights, serve the attention's 4-bit layers."""
        usual = self.method == "attention_lora" and not (self.lora_dropout or self.use_dora)
        return usual and self.attention_storage == "nf4" and self.device == "cuda"

    @property
    def accumulates(self) -> bool:
        return self.accumulation > 1

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len

    @property
    def size(self) -> int:
        """Bytes of an element in the matrix products."""
        return 4 if self.dtype == "float32" else 2

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream: embeddings and norms that train in float32 make it float32."""
        return 4 if self.method == "non_moe" else self.size

    @property
    def mixed(self) -> bool:
        """Whether autocast makes 16-bit copies of float32 weights and activations."""
        return self.stream != self.size

    @property
    def trained(self) -> int:
        """Parameters that train."""
        if self.method == "attention_lora":
            return self.arch.lora_params(self.lora_r, self.lora_targets, dora=self.use_dora, router=self.router)
        return self.arch.non_moe_params(router=self.router)
