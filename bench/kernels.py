"""`python -m bench kernels`: one layer's kernels against the copy rate, and the experts of one layer by backend.

The bytes of a kernel are the least it can move: each input once, each output once. So a gather that reads a token's row
once for each of its experts has a rate below the copy rate by what the caches do not catch.

Routing: `even` gives every expert about the same number of rows, `skewed` draws experts in proportion to 1, 1/2, 1/3,
... On a CPU everything runs a few times, to show that it does.

Leaves out: correctness, which the tests of the kernels show.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from bench.peers import SHAPE
from finetune.bench.result import conditions, rounded
from finetune.bench.roofline import copy_rate, sustained_seconds
from finetune.checkpoint.json_file import read_json
from finetune.console import Report
from finetune.errors import DeviceError
from finetune.kernels.expert_operation import choose_backend
from finetune.kernels.packed_experts import ExpertStorage, PackedExperts, dequantize_experts
from finetune.kernels.rows import combine_rows, gather_rows, sort_by_expert, swiglu_backward_, swiglu_forward
from finetune.kernels.skinny_gemm import skinny_experts, to_fp16_activations
from finetune.moe.arch import EXPERT_PROJECTIONS, GATE_UP_PROJ, MoeArch
from finetune.moe.experts import QuantizedExperts

TOKENS = (1024, 2048, 8192)
FEW_TOKENS = (1, 2, 4, 16, 64)
STORAGES: tuple[ExpertStorage, ...] = get_args(ExpertStorage)
_SUSTAINED_SECONDS = 0.3


def bench_kernels(report: Report, *, shape: Path | None = None, tokens: Sequence[int] = TOKENS) -> dict[str, Any]:
    """Measures the kernels at a shape and prints the tables; returns the JSON line's content.

    Args:
        shape: folder whose config.json gives the shape; Mixtral 8x7B's when None.
        tokens: sizes of the experts' micro-batch; row kernels are measured at the largest.

    Raises:
        ModelError: the shape cannot be read or is no supported mixture of experts.
    """
    shape = shape or SHAPE
    arch = MoeArch.from_config(read_json(shape / "config.json"), where=str(shape))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    copied = copy_rate(device) if device.type == "cuda" else None
    layer = _random_layer(arch, device, dtype)
    kernels = [
        *_dequantization(arch, layer.packed(GATE_UP_PROJ), device, dtype),
        *_dequantization_low_bit(arch, device, dtype),
        *_row_kernels(arch, max(tokens), device, dtype),
    ]
    for kernel in kernels:
        kernel["share_of_copy"] = None if copied is None else rounded(kernel["bytes_per_second"] / copied)
    decoding = []
    for storage in STORAGES:
        stored = layer if storage == "nf4" else _random_layer(arch, device, dtype, storage)
        decoding += [_few(arch, stored, count, device, dtype, copied) for count in FEW_TOKENS]
    experts = [
        _experts(arch, layer, backend, count, routing, device, dtype)
        for count in tokens
        for routing in ("even", "skewed")
        for backend in ("grouped", "loop")
    ]
    document = {
        "bench": "kernels",
        "shape": os.path.relpath(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_second": rounded(copied),
        "kernels": kernels,
        "decoding": decoding,
        "experts": experts,
        **conditions(device),
    }
    _show(document, report)
    return document


def _random_layer(
    arch: MoeArch, device: torch.device, dtype: torch.dtype, storage: ExpertStorage = "nf4"
) -> QuantizedExperts:
    layer = QuantizedExperts(arch.experts, arch.hidden, arch.intermediate, storage=storage)
    for projection, (out, in_) in arch.expert_shapes().items():
        layer.quantize(projection, torch.randn(arch.experts, out, in_, device=device, dtype=dtype) * 0.02)
    return layer


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return sustained_seconds(work, warm_up=_SUSTAINED_SECONDS)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _timed(name: str, bytes_moved: int, work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    seconds = _seconds(work, device)
    return {
        "kernel": name,
        "milliseconds": rounded(seconds * 1000),
        "bytes_per_second": rounded(bytes_moved / seconds),
    }


def _dequantization(
    arch: MoeArch, stack: PackedExperts, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    weights = arch.experts * stack.matrix_shape[0] * stack.matrix_shape[1]
    moved = stack.nbytes + weights * dtype.itemsize
    fused = torch.randn(arch.experts, *stack.matrix_shape, device=device, dtype=dtype)
    packed, state = bnb.quantize_4bit(fused, blocksize=64, compress_statistics=True, quant_type="nf4")
    del fused
    return [
        _timed("dequantize NF4", moved, lambda: dequantize_experts(stack, dtype), device),
        _timed("dequantize NF4, bitsandbytes", moved, lambda: bnb.dequantize_4bit(packed, state), device),
    ]


def _dequantization_low_bit(arch: MoeArch, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for storage in STORAGES[1:]:
        stack = _random_layer(arch, device, dtype, storage).packed(GATE_UP_PROJ)
        moved = stack.nbytes + arch.experts * stack.matrix_shape[0] * stack.matrix_shape[1] * dtype.itemsize
        rows.append(_timed(f"dequantize {storage}", moved, partial(dequantize_experts, stack, dtype), device))
    return rows


def _few(
    arch: MoeArch, layer: QuantizedExperts, tokens: int, device: torch.device, dtype: torch.dtype, copied: float | None
) -> dict[str, Any]:
    """One layer's experts in a decoding step of so many rows, each with its own choices."""
    gate_up, down = (layer.packed(projection) for projection in EXPERT_PROJECTIONS)
    rows = to_fp16_activations(torch.randn(tokens, arch.hidden, device=device, dtype=dtype))
    index = _routing(arch, tokens, "even", device)
    seconds = _seconds(lambda: skinny_experts(rows, index, gate_up, down), device)
    read = (gate_up.nbytes + down.nbytes) * index.unique().numel() / arch.experts
    return {
        "storage": layer.storage,
        "tokens": tokens,
        "microseconds": rounded(seconds * 1e6),
        "bytes_per_second": rounded(read / seconds),
        "share_of_copy": None if copied is None else rounded(read / seconds / copied),
    }


def _row_kernels(arch: MoeArch, tokens: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    hidden, inner, top_k, size = arch.hidden, arch.intermediate, arch.top_k, dtype.itemsize
    rows = tokens * top_k
    x_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
    y_SH = torch.randn(rows, hidden, device=device, dtype=dtype)
    h_S2F = torch.randn(rows, 2 * inner, device=device, dtype=dtype)
    v_SF = torch.randn(rows, inner, device=device, dtype=dtype)
    weight_TK = torch.rand(tokens, top_k, device=device)
    index = _routing(arch, tokens, "even", device)
    sorted_rows = sort_by_expert(index, arch.experts)
    ends = (tokens + rows) * hidden * size
    return [
        _timed("sort by expert", 3 * rows * 8, lambda: sort_by_expert(index, arch.experts), device),
        _timed("gather", ends + 8 * rows, lambda: gather_rows(x_TH, sorted_rows.token_S), device),
        _timed("swiglu forward", 3 * rows * inner * size, lambda: swiglu_forward(h_S2F), device),
        # In place: repeated on its own result, whose values do not change its time.
        _timed(
            "swiglu backward",
            5 * rows * inner * size,
            lambda: swiglu_backward_(h_S2F, v_SF, weight_TK, sorted_rows.order_S),
            device,
        ),
        _timed("combine", ends + 12 * rows, lambda: combine_rows(y_SH, sorted_rows.position_TK, weight_TK), device),
    ]


def _routing(arch: MoeArch, tokens: int, routing: str, device: torch.device) -> Tensor:
    """Choices [T, K], each token's experts distinct."""
    odds = torch.ones(arch.experts) if routing == "even" else 1 / torch.arange(1, arch.experts + 1)
    return torch.multinomial(odds.expand(tokens, -1), arch.top_k).to(device)


def _experts(
    arch: MoeArch,
    layer: QuantizedExperts,
    backend: Any,
    tokens: int,
    routing: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One layer's experts, forward and backward."""
    case = {"backend": backend, "tokens": tokens, "routing": routing}
    try:
        choose_backend(backend, device, dtype, rows=tokens * arch.top_k, experts=arch.experts, weights=1)
    except DeviceError:
        return {**case, "status": "does not run here"}
    layer.backend = backend
    x = torch.randn(tokens, arch.hidden, device=device, dtype=dtype, requires_grad=True)
    index = _routing(arch, tokens, routing, device)
    weight = torch.rand(tokens, arch.top_k, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x, index, weight)

    def both() -> None:
        torch.autograd.grad(layer(x, index, weight), (x, weight), grad)

    forward_seconds, both_seconds = _seconds(forward, device), _seconds(both, device)
    flops = 2 * arch.top_k * tokens * sum(out * in_ for out, in_ in arch.expert_shapes().values())
    return {
        **case,
        "status": "measured",
        "forward_milliseconds": rounded(forward_seconds * 1000),
        "both_milliseconds": rounded(both_seconds * 1000),
        "forward_tflops": rounded(flops / forward_seconds / 1e12),
        "both_tflops": rounded(2 * flops / both_seconds / 1e12),
    }


def _show(document: dict[str, Any], report: Report) -> None:
    rows = [
        (
            kernel["kernel"],
            f"{kernel['milliseconds']:.3f}",
            f"{kernel['bytes_per_second'] / 1e9:,.0f}",
            "" if kernel["share_of_copy"] is None else f"{kernel['share_of_copy']:.0%}",
        )
        for kernel in document["kernels"]
    ]
    if document["copy_bytes_per_second"] is not None:
        rows.append(("copy", "", f"{document['copy_bytes_per_second'] / 1e9:,.0f}", "100%"))
    report.table(f"Kernels, {document['dtype']}, {document['device']}", ("kernel", "ms", "GB/s", "of copy"), rows)
    few = [
        (
            case["storage"],
            str(case["tokens"]),
            f"{case['microseconds']:,.0f}",
            f"{case['bytes_per_second'] / 1e9:,.0f}",
            "" if case["share_of_copy"] is None else f"{case['share_of_copy']:.0%}",
        )
        for case in document["decoding"]
    ]
    report.table("Experts of one layer, decoding", ("experts", "rows", "us", "GB/s", "of copy"), few)
    cases = [
        (
            f"{case['tokens']} {case['routing']}",
            case["backend"],
            f"{case['forward_milliseconds']:.2f}",
            f"{case['forward_tflops']:.3g}",
            f"{case['both_milliseconds']:.2f}",
            f"{case['both_tflops']:.3g}",
        )
        for case in document["experts"]
        if case["status"] == "measured"
    ]
    columns = ("tokens, routing", "backend", "forward ms", "TFLOP/s", "with backward ms", "TFLOP/s")
    report.table("Experts of one layer", columns, cases)
