"""How much memory a training run needs, before anything is loaded, and what to change when it does not fit.

Why: a run that dies of memory after minutes of loading tells nobody what to change. The weights of this model class
are known to the byte from config.json, so the preflight can say both the number and the way out in milliseconds.

How: one `MemoryItem` for each thing that occupies the device, each with the formula that made it. Weights, gradients
and optimizer states are exact. What a step needs on top is modelled after what the code keeps: the gate_up output of
one layer's experts, the row buffers of the mixture, attention's saved tensors, the tiles of TRL's fused LM head.
Everything grows with the tokens of a micro-batch, so the largest micro-batch is found by bisection of the same sum.

Leaves out: memory of other processes, evaluation batches larger than training's, sharding (each process is counted
as holding everything), and the allocator's own rounding, for which there is a margin.

Units: bytes; T tokens of a micro-batch, S = T * top_k rows, H hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from finetune.arch import ATTENTION_PROJECTIONS, MoeArch

GIB = 2**30
CUDA_CONTEXT = GIB // 2
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4_BLOCK, NESTED_BLOCK = 64, 256
# A bitsandbytes layer keeps its 16 NF4 values and the 256 values of its nested code, in float32, for itself.
LAYER_CODE_TABLES = (16 + 256) * 4
# trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE: one tile of logits.
LOGIT_TILE = (4096, 32768)
# The busiest expert of a layer gets this many times its even share of rows.
BUSIEST_EXPERT = 2
# float32 vectors of length F per row while one expert's SwiGLU runs backward.
SWIGLU_BACKWARD_VECTORS = 10
MAX_MICRO_BATCH = 2**16
# Optimizer (transformers' name) -> states a parameter, bits a state. Others count as AdamW in 32 bits.
OPTIMIZER_STATES = {
    "adamw_torch": (2, 32),
    "adamw_torch_fused": (2, 32),
    "adamw_8bit": (2, 8),
    "adamw_bnb_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_32bit": (1, 32),
    "lion_8bit": (1, 8),
    "rmsprop": (1, 32),
    "sgd": (0, 32),
}
Method = Literal["attention_lora", "non_moe"]
AttentionStorage = Literal["nf4", "16bit"]
Device = Literal["cuda", "cpu"]
Kind = Literal["weights", "training", "step", "fixed"]


@dataclass(frozen=True)
class MemoryItem:
    """One thing that occupies the device, and where its size comes from."""

    name: str
    bytes: int
    kind: Kind
    detail: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The items, what they add up to, and what to do when that is too much.

    `device_bytes` is None where the device's size is not known; then nothing is said about fitting.
    """

    items: tuple[MemoryItem, ...]
    device_bytes: int | None
    micro_batch: int
    seq_len: int
    largest_micro_batch: int | None
    advice: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def weight_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.kind == "weights")

    @property
    def trained_bytes(self) -> int:
        """The float32 weights that train, as large as their gradients."""
        return sum(item.bytes for item in self.items if item.name == "gradients")

    @property
    def checkpoint_bytes(self) -> int:
        """Trained weights and optimizer states, as a checkpoint holds them."""
        return self.trained_bytes + sum(item.bytes for item in self.items if item.name == "optimizer")

    @property
    def fits(self) -> bool:
        """True as well when the device's size is not known."""
        return self.device_bytes is None or self.total_bytes <= self.device_bytes

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, GiB, how) for a table, the total last."""
        rows = [(item.name, f"{item.bytes / GIB:.2f}", item.detail) for item in self.items]
        size = "" if self.device_bytes is None else f"of {self.device_bytes / GIB:.2f} GiB on the device"
        return [*rows, ("total", f"{self.total_bytes / GIB:.2f}", size)]

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "total_bytes": self.total_bytes,
            "weight_bytes": self.weight_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class _Run:
    """What the estimate depends on; `replace` asks what would be if."""

    arch: MoeArch
    method: Method
    lora_r: int
    lora_targets: tuple[str, ...]
    use_dora: bool
    router: bool
    attention_storage: AttentionStorage
    optimizer: str
    micro_batch: int
    seq_len: int
    gradient_checkpointing: bool
    dtype_bytes: int
    processes: int
    device: Device

    @property
    def total(self) -> int:
        return sum(item.bytes for item in _items(self))


def estimate(
    arch: MoeArch,
    *,
    method: Method = "attention_lora",
    lora_r: int = 16,
    lora_targets: tuple[str, ...] = ATTENTION_PROJECTIONS,
    use_dora: bool = False,
    router: bool = False,
    attention_storage: AttentionStorage = "nf4",
    optimizer: str = "adamw_torch_fused",
    micro_batch: int = 1,
    seq_len: int = 1024,
    gradient_checkpointing: bool = True,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    processes: int = 1,
    device: Device = "cuda",
    device_bytes: int | None = None,
) -> MemoryEstimate:
    """Adds up one process of a run.

    Args:
        micro_batch: sequences of one forward and backward pass (`training.per_device_train_batch_size`).
        seq_len: tokens of a sequence (`training.max_length`).
        dtype: of what is not quantized, and of the arithmetic.
        processes: more than one adds the buckets of data-parallel gradients.
        device_bytes: all memory of the device; None leaves out the largest micro-batch and the advice.
    """
    assert method == "attention_lora" or attention_storage == "16bit", "the recipe refuses to train NF4 weights"
    assert micro_batch > 0
    assert seq_len > 0
    run = _Run(
        arch=arch,
        method=method,
        lora_r=lora_r,
        lora_targets=lora_targets,
        use_dora=use_dora,
        router=router,
        attention_storage=attention_storage,
        optimizer=optimizer,
        micro_batch=micro_batch,
        seq_len=seq_len,
        gradient_checkpointing=gradient_checkpointing,
        dtype_bytes=DTYPE_BYTES[dtype],
        processes=processes,
        device=device,
    )
    fits_not = device_bytes is not None and run.total > device_bytes
    return MemoryEstimate(
        items=_items(run),
        device_bytes=device_bytes,
        micro_batch=micro_batch,
        seq_len=seq_len,
        largest_micro_batch=None if device_bytes is None else _largest_micro_batch(run, device_bytes),
        advice=_advice(run, device_bytes) if fits_not and device_bytes is not None else (),
    )


def nf4_bytes(elements: int) -> int:
    """Bytes of one matrix in NF4 with double quantization: codes, 8-bit scales, float32 scales of scales, offset."""
    scales = -(-elements // NF4_BLOCK)
    return -(-elements // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + 4


# ---- items ----------------------------------------------------------------------------------------------------


def _items(run: _Run) -> tuple[MemoryItem, ...]:
    before_margin = [*_weights(run), *_training(run), *_step(run)]
    if run.device == "cpu":
        return tuple(before_margin)
    moving = sum(item.bytes for item in before_margin if item.kind == "step")
    margin = GIB // 4 + moving // 20
    return (
        *before_margin,
        MemoryItem("CUDA context", CUDA_CONTEXT, "fixed", "libraries and kernels, 0.5 GiB"),
        MemoryItem("margin", margin, "fixed", "fragmentation: 0.25 GiB and 5% of what a step needs"),
    )


def _weights(run: _Run) -> list[MemoryItem]:
    arch = run.arch
    matrices = arch.layers * arch.experts
    experts = matrices * sum(nf4_bytes(out * in_) for out, in_ in arch.expert_shapes().values())
    masters = run.method == "non_moe"
    size = 4 if masters else run.dtype_bytes
    kept = "float32 masters" if masters else f"{8 * size} bit"
    if run.attention_storage == "nf4":
        a_layer = sum(nf4_bytes(out * in_) + LAYER_CODE_TABLES for out, in_ in arch.attention_shapes().values())
        attention = MemoryItem("attention", arch.layers * a_layer, "weights", "NF4, double quantization")
    else:
        attention = MemoryItem("attention", arch.attention_params * size, "weights", kept)
    tied = ", tied" if arch.tied else ""
    return [
        MemoryItem(
            "experts", experts, "weights", f"NF4, double quantization: {arch.expert_params / 1e9:.2f} B weights"
        ),
        attention,
        MemoryItem("embeddings and head", arch.embedding_params * size, "weights", kept + tied),
        MemoryItem("norms", arch.norm_params * size, "weights", kept),
        MemoryItem("router", arch.router_params * size, "weights", kept),
    ]


def _training(run: _Run) -> list[MemoryItem]:
    count, lora = _trained(run), run.method == "attention_lora"
    states, bits = OPTIMIZER_STATES.get(run.optimizer, (2, 32))
    known = "" if run.optimizer in OPTIMIZER_STATES else ", not known here: counted as AdamW"
    # 8-bit optimizers keep a float32 scale for every 256 values.
    state_bytes = states * (count * bits // 8 + (4 * -(-count // 256) if bits == 8 else 0))
    items = [
        MemoryItem("LoRA", 4 * count, "training", f"{count:,} float32 parameters") if lora else None,
        MemoryItem("gradients", 4 * count, "training", f"{count:,} in float32"),
        MemoryItem(
            "optimizer", state_bytes, "training", f"{run.optimizer}: {states} states in {bits} bits each{known}"
        ),
        MemoryItem("gradient buckets", 4 * count, "training", f"all-reduce over {run.processes} processes")
        if run.processes > 1
        else None,
    ]
    return [item for item in items if item is not None]


def _trained(run: _Run) -> int:
    if run.method == "attention_lora":
        return run.arch.lora_params(run.lora_r, run.lora_targets, dora=run.use_dora)
    return run.arch.non_moe_params(router=run.router)


def _step(run: _Run) -> list[MemoryItem]:
    arch, size, tokens = run.arch, run.dtype_bytes, run.micro_batch * run.seq_len
    # Trained in full, embeddings and norms make a float32 residual stream; matrix products run in `size` bytes.
    stream = 4 if run.method == "non_moe" else size
    kept_by_layer = _kept_by_layer(run, tokens, stream)
    items = [
        MemoryItem(
            "dequantized expert",
            size * 2 * max(out * in_ for out, in_ in arch.expert_shapes().values()),
            "step",
            "one expert's largest matrix, twice: the next is made before the last is free",
        )
    ]
    if run.method == "non_moe" and size < 4:
        copies = arch.attention_params + arch.vocab * arch.hidden
        items.append(MemoryItem("autocast copies", size * copies, "step", f"{8 * size}-bit attention and head"))
    if run.gradient_checkpointing:
        kept = arch.layers * tokens * arch.hidden * stream
        items.append(MemoryItem("activations", kept, "step", f"checkpoints: {arch.layers} layer inputs of T x H"))
        one_layer = kept_by_layer + _passing(run, tokens, stream)
        items.append(MemoryItem("one layer", one_layer, "step", "recomputed activations and its backward pass"))
    else:
        items.append(MemoryItem("activations", arch.layers * kept_by_layer, "step", "everything backward needs"))
        items.append(MemoryItem("one layer", _passing(run, tokens, stream), "step", "its backward pass"))
    items.append(MemoryItem("LM head", _lm_head(run, tokens, stream), "step", "logits in tiles of 4096 x 32768"))
    return items


def _kept_by_layer(run: _Run, tokens: int, stream: int) -> int:
    """What one layer keeps for its backward pass."""
    arch, size = run.arch, run.dtype_bytes
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    normed = 2 * arch.hidden * stream + (q + kv if arch.qk_norm else 0) * size
    norms = normed + 4 * (2 * arch.hidden + (q + kv if arch.qk_norm else 0))  # the result, and the float32 input
    attention = 2 * (q + 2 * kv) * size + q * size  # q, k, v before and after rotation, and the output
    residual = 2 * arch.hidden * stream
    lora_inputs = 4 * (3 * arch.hidden + q) if run.method == "attention_lora" else size * (3 * arch.hidden + q)
    gate_up = arch.top_k * 2 * arch.intermediate * size
    return tokens * (norms + attention + residual + lora_inputs + gate_up)


def _passing(run: _Run, tokens: int, stream: int) -> int:
    """What lives only while one layer's experts run backward (the largest moment of a layer)."""
    arch, size = run.arch, run.dtype_bytes
    rows = tokens * arch.top_k
    busiest = min(rows, BUSIEST_EXPERT * -(-rows // arch.experts))
    row_buffers = rows * arch.hidden * (2 * size + 4)  # sorted, unsorted, and summed in float32
    swiglu = busiest * (SWIGLU_BACKWARD_VECTORS * arch.intermediate * 4 + 2 * arch.hidden * size)
    gradient = 2 * tokens * arch.hidden * stream
    return row_buffers + swiglu + gradient


def _lm_head(run: _Run, tokens: int, stream: int) -> int:
    """TRL's fused head: a tile of logits, the float32 gradient of the hidden states, and of the head if it trains."""
    arch, (rows, columns) = run.arch, LOGIT_TILE
    hidden = tokens * arch.hidden * (4 + 2 * stream)
    head_gradient = 4 * arch.vocab * arch.hidden if run.method == "non_moe" else 0
    return min(tokens, rows) * columns * run.dtype_bytes + hidden + head_gradient


# ---- fitting --------------------------------------------------------------------------------------------------


def _largest_micro_batch(run: _Run, device_bytes: int) -> int:
    """The largest micro-batch that fits, 0 when none does."""
    low, high = 0, 1
    while high <= MAX_MICRO_BATCH and replace(run, micro_batch=high).total <= device_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if replace(run, micro_batch=middle).total <= device_bytes:
            low = middle
        else:
            high = middle
    return low


def _advice(run: _Run, device_bytes: int) -> tuple[str, ...]:
    """What to change, each line with what that alone would come to; then what all of it comes to, if too much."""
    lines: list[str] = []

    def propose(text: str, changed: _Run) -> None:
        outcome = "fits" if changed.total <= device_bytes else "not enough alone"
        lines.append(f"{text}: {changed.total / GIB:.2f} GiB, {outcome}")

    best = replace(run, micro_batch=1)
    if not run.gradient_checkpointing:
        best = replace(best, gradient_checkpointing=True)
        propose("set training.gradient_checkpointing: true", replace(run, gradient_checkpointing=True))
    largest = _largest_micro_batch(run, device_bytes)
    if run.micro_batch > 1:
        fewer = max(1, largest)
        propose(
            f"set training.per_device_train_batch_size: {fewer}, and more training.gradient_accumulation_steps",
            replace(run, micro_batch=fewer),
        )
    if run.method == "attention_lora" and run.attention_storage == "16bit":
        best = replace(best, attention_storage="nf4")
        propose("set quantization.attention: nf4", replace(run, attention_storage="nf4"))
    if run.method == "non_moe":
        if OPTIMIZER_STATES.get(run.optimizer, (2, 32))[1] == 32:
            propose("set training.optim: adamw_8bit", replace(run, optimizer="adamw_8bit"))
        lora: dict[str, Any] = {"method": "attention_lora", "attention_storage": "nf4", "router": False}
        best = replace(best, **lora)
        propose("set trainable.method: attention_lora with quantization.attention: nf4", replace(run, **lora))
    shorter = [run.seq_len // 2**halvings for halvings in (1, 2, 3) if run.seq_len // 2**halvings >= 128]
    for seq_len in shorter:
        if replace(run, seq_len=seq_len).total <= device_bytes:
            propose(f"set training.max_length: {seq_len}", replace(run, seq_len=seq_len))
            break
    if best.total > device_bytes:
        lines.append(
            f"with one sequence and all of this it still needs {best.total / GIB:.2f} GiB: use a larger device"
        )
    return tuple(lines)
