"""`python -m bench experts`: what each storage of the experts costs in quality, on held-out text.

The reference is the checkpoint in 16 bits; a candidate is the same model with only its experts quantized, so that
nothing but the storage differs. A table of bytes, weight error, held-out loss, KL, and routing, then one JSON line.

The 16-bit model and one quantized copy of its experts must fit the device: 110 GB for Mixtral 8x7B.

Leaves out: attention, which stays in 16 bits here, and speed (`finetune bench decode`, `bench kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.bench.result import conditions, rounded
from finetune.console import Report, gib
from finetune.data.pipeline import Reading, encode_source
from finetune.data.sources import Source, open_source
from finetune.data.worker import Supervision
from finetune.errors import ModelError
from finetune.evaluate.divergence import Row, completion_loss, fidelity, swapped
from finetune.kernels.packed_experts import ExpertStorage, dequantize_expert
from finetune.moe.arch import EXPERT_PROJECTIONS, MoeArch, experts_path
from finetune.moe.base_spec import BaseSpec
from finetune.moe.experts import QuantizedExperts
from finetune.moe.load import check_base, load_tokenizer, resolve_device, resolve_dtype, saved_quantization

STORAGES: tuple[ExpertStorage, ...] = get_args(ExpertStorage)


def bench_experts(
    model: str,
    report: Report,
    *,
    data: str,
    rows: int = 64,
    storages: Sequence[ExpertStorage] = STORAGES,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measures and prints the table; returns the JSON line's content.

    Args:
        model: folder or hub id of a checkpoint in 16 bits.
        data: held-out conversations.
        rows: how many of them.

    Raises:
        FinetuneError: the checkpoint or the data cannot be read, or the checkpoint is quantized.
    """
    where = resolve_device(device)
    open_source(Source(data))
    config, arch = check_base(BaseSpec(model, attention="16bit"))
    if saved_quantization(config):
        raise ModelError(
            "there is nothing to compare with: the checkpoint is quantized",
            where=model,
            allowed="a checkpoint in 16 bits",
            fix="name the original checkpoint",
        )
    tokenizer = load_tokenizer(model)
    reading = Reading(Source(data, max_rows=rows))
    held_out: list[Row] = list(encode_source(reading, tokenizer, Supervision()).dataset)
    loader: Any = AutoModelForCausalLM  # its stub hides the keyword arguments
    plain = loader.from_pretrained(model, dtype=resolve_dtype(dtype, where), device_map={"": where}).eval()
    loss, tokens = completion_loss(plain, held_out, where)
    measured = [_measure(plain, arch, storage, held_out, where) for storage in storages]
    document = {
        "bench": "experts",
        "model": model,
        "data": data,
        "rows": len(held_out),
        "supervised_tokens": tokens,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "reference_bytes": 2 * arch.expert_params,
        "reference_loss": rounded(loss, 6),
        "storages": measured,
        **conditions(where),
    }
    _print(document, report)
    return document


@torch.no_grad()
def _measure(
    plain: Any, arch: MoeArch, storage: ExpertStorage, rows: Sequence[Row], device: torch.device
) -> dict[str, Any]:
    replacements: dict[str, nn.Module] = {}
    squares = {"error": 0.0, "weight": 0.0}
    size = 0
    for layer in range(arch.layers):
        fused = plain.get_submodule(experts_path(layer))
        quantized = QuantizedExperts(arch.experts, arch.hidden, arch.intermediate, storage=storage)
        for projection in EXPERT_PROJECTIONS:
            weight = fused.get_parameter(projection)
            quantized.quantize(projection, weight)
            weights = quantized.packed(projection)
            size += weights.nbytes
            for expert, matrix in enumerate(weight):
                difference = dequantize_expert(weights, expert, torch.float32) - matrix.float()
                squares["error"] += difference.square().sum().item()
                squares["weight"] += matrix.float().square().sum().item()
        replacements[experts_path(layer)] = quantized
    compared = fidelity(plain, lambda: swapped(plain, replacements), rows, device, layers=arch.layers, top_k=arch.top_k)
    return {
        "storage": storage,
        "bytes": size,
        "bits_per_weight": rounded(8 * size / arch.expert_params),
        "weight_error": rounded((squares["error"] / squares["weight"]) ** 0.5),
        "loss": rounded(compared.candidate_loss, 6),
        "kl": rounded(compared.kl),
        "greedy_agreement": rounded(compared.greedy_agreement),
        "top_k_overlap": rounded(compared.top_k_overlap),
    }


def _print(document: dict[str, Any], report: Report) -> None:
    first = ("16-bit", "16.00", gib(document["reference_bytes"]), "", f"{document['reference_loss']:.4f}", "", "", "")
    rows = [
        (
            row["storage"],
            f"{row['bits_per_weight']:.2f}",
            gib(row["bytes"]),
            f"{row['weight_error']:.3f}",
            f"{row['loss']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['greedy_agreement']:.1%}",
            f"{row['top_k_overlap']:.1%}",
        )
        for row in document["storages"]
    ]
    columns = ("experts", "bits", "size", "weight error", "loss", "KL", "same token", "same experts")
    report.table(f"Experts of {document['model']} on {document['supervised_tokens']:,} tokens", columns, [first, *rows])
