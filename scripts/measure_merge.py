"""Measures `finetune merge --format bf16`: peak host memory, and bytes a second beside the disk's own copy rate.

    python scripts/measure_merge.py FOLDER [--layers 8] [--onto trained] [--keep]

Makes a bf16 Mixtral of full width in the hub's layout (2.9 GB a layer and 0.5 GB, one random matrix for every shape)
and an adapter on it, copies the checkpoint (read from the disk, written to the disk), and merges it in a process of its
own. Needs twice the checkpoint of free disk. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from finetune.adapter.files import LORA_TENSORS
from finetune.bench.workload import BUNDLED
from finetune.console import Report, gib
from finetune.disk import require_space, write_json
from finetune.moe.arch import ATTENTION_PROJECTIONS, EXPERT_PROJECTIONS, MoeArch, hub_expert_names
from finetune.moe.base_spec import BaseSpec, fingerprint_of
from finetune.moe.base_weights import Tensors
from finetune.moe.load import load_tokenizer

SHAPE = BUNDLED.parent / "mixtral-8x7b" / "shape" / "config.json"
_BLOCK = 2**22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--onto", default="trained", choices=("trained", "original"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for another measurement")
    args = parser.parse_args()
    base, adapter, merged = (args.folder / name for name in ("base", "adapter", "merged"))
    config = {**json.loads(SHAPE.read_text(encoding="utf-8")), "num_hidden_layers": args.layers}
    arch = MoeArch.from_config(config)
    if not base.is_dir():
        require_space(args.folder, 4 * arch.total_params, what="the checkpoint, and its copy or the merged model")
        make_checkpoint(base, config, arch)
        make_adapter(adapter, base, arch)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    copying = copy_seconds(base, args.folder / "copy")
    forget(base)
    shutil.rmtree(merged, ignore_errors=True)
    start = time.perf_counter()
    command = ["-m", "finetune", "merge", adapter, "--output", merged, "--format", "bf16", "--onto", args.onto]
    process = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    merging = time.perf_counter() - start
    assert os.waitstatus_to_exitcode(status) == 0, "the merge failed"
    made = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    shutil.rmtree(merged)
    if not args.keep:
        shutil.rmtree(args.folder)
    document: dict[str, Any] = {
        "bench": "merge",
        "onto": args.onto,
        "layers": args.layers,
        "bytes": made,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "merge_seconds": round(merging, 1),
        "merge_bytes_per_second": round(made / merging),
        "copy_bytes_per_second": round(size / copying),
        "share_of_copy": round(made / merging / (size / copying), 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }
    rows = [
        ("checkpoint", gib(made)),
        ("peak memory of the process", gib(document["peak_rss_bytes"])),
        ("merge, all of the command", f"{merging:.0f} s, {gib(made / merging)}/s"),
        ("copy of the checkpoint", f"{copying:.0f} s, {gib(size / copying)}/s"),
        ("share of the copy rate", f"{document['share_of_copy']:.0%}"),
    ]
    report = Report()
    report.table(f"finetune merge --format bf16 --onto {args.onto}, {args.layers} layers", ("", "measured"), rows)
    report.line(json.dumps(document))


def make_checkpoint(folder: Path, config: dict[str, Any], arch: MoeArch) -> None:
    """One shard a layer, and one of embedding, head and last norm."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    load_tokenizer(str(BUNDLED / "model")).save_pretrained(folder)
    torch.manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def save(shard: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, shape in shapes.items():
            if shape not in drawn:
                drawn[shape] = (torch.randn(shape) * 0.02).to(torch.bfloat16)
            # safetensors refuses tensors that share memory.
            tensors[name] = drawn[shape].clone()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, shard))

    for layer in range(arch.layers):
        path = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{path}.self_attn.{name}.weight": shape for name, shape in arch.attention_shapes().items()
        }
        shapes |= {f"{path}.{name}.weight": (arch.hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{path}.block_sparse_moe.gate.weight"] = (arch.experts, arch.hidden)
        for expert in range(arch.experts):
            for projection, (out, in_) in zip(EXPERT_PROJECTIONS, arch.expert_shapes().values(), strict=True):
                names = hub_expert_names(arch.model_type, layer, expert, projection)
                shapes |= dict.fromkeys(names, (out // len(names), in_))
        save(f"layer-{layer}.safetensors", shapes)
    vocabulary = (arch.vocab, arch.hidden)
    ends = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (arch.hidden,)}
    save("ends.safetensors", ends)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def make_adapter(folder: Path, base: Path, arch: MoeArch) -> None:
    """LoRA of rank 16 on q/k/v/o, as a run saves it."""
    folder.mkdir(parents=True)
    targets = [f"self_attn.{name}" for name in ATTENTION_PROJECTIONS]
    LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets).save_pretrained(str(folder))
    tensors = {}
    for layer in range(arch.layers):
        for name, (out, in_) in arch.attention_shapes().items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(16, in_) * 0.02
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, 16) * 0.02
    save_file(tensors, folder / LORA_TENSORS, metadata={"format": "pt"})
    load_tokenizer(str(BUNDLED / "model")).save_pretrained(folder)
    torch.manual_seed(0)
    router = Tensors([base / "layer-0.safetensors"]).read("model.layers.0.block_sparse_moe.gate.weight")
    BaseSpec(str(base), fingerprint=fingerprint_of([router] * arch.layers)).save(folder)


def copy_seconds(source: Path, target: Path) -> float:
    """Reading every shard from the disk and writing it to the disk, one block after another."""
    forget(source)
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as reading, (target / file.name).open("wb", buffering=0) as writing:
            while block := reading.read(_BLOCK):
                writing.write(block)
            os.fsync(writing.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
