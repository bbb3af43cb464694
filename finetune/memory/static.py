"""What is there all the time: weights to the byte, trained parameters and optimizer states."""

from __future__ import annotations

from finetune.memory.run import ExpertStorage, MemoryItem, Run

NF4_BLOCK, NESTED_BLOCK = 64, 256
HQQ_GROUP = 64
EXPERT_FORMATS: dict[ExpertStorage, str] = {
    "nf4": "NF4, double quantization",
    "hqq3": "3 bits (HQQ)",
    "hqq2": "2 bits (HQQ)",
}
# A bitsandbytes layer keeps its 16 NF4 values and the 256 values of its nested code, in float32, for itself.
LAYER_CODE_TABLES = (16 + 256) * 4
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


def nf4_bytes(elements: int) -> int:
    """Bytes of one matrix in NF4 with double quantization: codes, 8-bit scales, float32 scales of scales, offset."""
    scales = -(-elements // NF4_BLOCK)
    return -(-elements // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + 4


def expert_bytes(elements: int, storage: ExpertStorage) -> int:
    """Bytes of one expert's matrix: NF4, or codes of 2 or 3 bits with a scale and a zero in fp16 for each group."""
    if storage == "nf4":
        return nf4_bytes(elements)
    return elements * (3 if storage == "hqq3" else 2) // 8 + 4 * elements // HQQ_GROUP


def weights(run: Run) -> list[MemoryItem]:
    arch = run.arch
    matrices = arch.layers * arch.experts
    experts = matrices * sum(expert_bytes(out * in_, run.experts_storage) for out, in_ in arch.expert_shapes().values())
    size = 4 if run.method == "non_moe" else run.size
    kept = "float32 masters" if run.method == "non_moe" else f"{8 * size} bit"
    if run.attention_storage == "nf4":
        a_layer = sum(nf4_bytes(out * in_) + LAYER_CODE_TABLES for out, in_ in arch.attention_shapes().values())
        attention = MemoryItem("attention", arch.layers * a_layer, "weights", "NF4, double quantization")
    else:
        attention = MemoryItem("attention", arch.attention_params * size, "weights", kept)
    dequantized = []
    if run.resident_attention:
        elements = arch.layers * sum(
            out * in_ for n, (out, in_) in arch.attention_shapes().items() if n in run.lora_targets
        )
        dequantized = [MemoryItem("attention, dequantized", elements * size, "weights", "spares dequantizing it anew")]
    tied = ", tied" if arch.tied else ""
    return [
        MemoryItem(
            "experts",
            experts,
            "weights",
            f"{EXPERT_FORMATS[run.experts_storage]}: {arch.expert_params / 1e9:.2f} B weights",
        ),
        attention,
        *dequantized,
        MemoryItem("embeddings and head", arch.embedding_params * size, "weights", kept + tied),
        MemoryItem("norms", arch.norm_params * size, "weights", kept),
        MemoryItem("router", arch.router_params * size, "weights", kept),
    ]


def training(run: Run) -> list[MemoryItem]:
    """The adapter, the optimizer's states and the buckets; gradients come and go with the step."""
    count = run.trained
    known = "" if run.optimizer in OPTIMIZER_STATES else ", not known here: counted as AdamW"
    states, bits = optimizer_states(run.optimizer)
    # 8-bit optimizers keep a float32 scale for every 256 values.
    state_bytes = states * (count * bits // 8 + (4 * -(-count // 256) if bits == 8 else 0))
    items = [
        MemoryItem("optimizer", state_bytes, "training", f"{run.optimizer}: {states} states in {bits} bits each{known}")
    ]
    if run.method == "attention_lora":
        routers = run.arch.router_params if run.router else 0
        items.insert(
            0, MemoryItem("LoRA", 4 * (count - routers), "training", f"{count - routers:,} float32 parameters")
        )
        if routers:
            items.insert(1, MemoryItem("trained routers", 4 * routers, "training", f"{routers:,} float32 parameters"))
    if run.processes > 1:
        buckets = f"all-reduce over {run.processes} processes"
        items.append(MemoryItem("gradient buckets", 4 * count, "training", buckets))
    return items


def optimizer_states(optimizer: str) -> tuple[int, int]:
    """States a parameter, bits a state."""
    return OPTIMIZER_STATES.get(optimizer, (2, 32))
