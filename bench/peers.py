"""`python -m bench peers`: the stacks of peer.py, one after the other, each in its own process on the same GPU.

A stack that is not installed, that needs a GPU where there is none, or that fails has a row that says so; the others
are measured all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finetune.bench.peer import PEERS
from finetune.bench.result import conditions, rounded
from finetune.bench.workload import WARM_UP
from finetune.checkpoint.json_file import read_json
from finetune.console import Report, gib
from finetune.moe.arch import MoeArch

SHAPE = Path(__file__).resolve().parents[1] / "recipes" / "mixtral-8x7b" / "shape"
_LINES_OF_ERROR = 3


def bench_peers(
    report: Report, *, shape: Path | None = None, batch: int = 8, length: int = 1024, steps: int = 8, layers: int = 0
) -> dict[str, Any]:
    """Measures what is installed and prints the table; returns the JSON line's content.

    Args:
        shape: folder whose config.json gives the shape; Mixtral 8x7B's when None.
        layers: builds only so many layers of full width and multiplies the time; 0 is all of them.

    Raises:
        ModelError: the shape cannot be read or is no supported mixture of experts.
    """
    shape = shape or SHAPE
    arch = MoeArch.from_config(read_json(shape / "config.json"), where=str(shape))
    layers = min(layers, arch.layers) or arch.layers
    peers = [_measure(peer, shape, arch, batch=batch, length=length, steps=steps, layers=layers) for peer in PEERS]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    document = {
        "bench": "peers",
        "shape": os.path.relpath(shape),
        "batch": batch,
        "length": length,
        "warm_up": WARM_UP,
        "steps": steps,
        "layers": layers,
        "scaled_to_layers": arch.layers,
        "peers": peers,
        **conditions(device),
    }
    scaled = "" if layers == arch.layers else f", {layers} of {arch.layers} layers measured and scaled"
    report.table(
        f"Peers, bare step: {batch} x {length} tokens, {document['device']}{scaled}",
        ("stack", "tokens/s", "s/step", "peak allocated", "peak reserved"),
        [_row(peer) for peer in peers],
    )
    return document


def _measure(
    peer: str, shape: Path, arch: MoeArch, *, batch: int, length: int, steps: int, layers: int
) -> dict[str, Any]:
    missing = [package for package in PEERS[peer] if find_spec(package) is None]
    if missing:
        return {"peer": peer, "status": f"not installed: {', '.join(missing)}"}
    if peer == "liger" and arch.model_type != "mixtral":
        return {"peer": peer, "status": f"patches Mixtral, not {arch.model_type}"}
    if peer != "parametrization" and not torch.cuda.is_available():
        return {"peer": peer, "status": "needs a GPU"}
    options = {"shape": shape, "batch": batch, "length": length, "steps": steps, "layers": layers}
    command = [sys.executable, "-m", "finetune.bench.peer", peer]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        last = [line for line in done.stderr.splitlines() if line.strip()][-_LINES_OF_ERROR:]
        return {"peer": peer, "status": "failed: " + " | ".join(last)}
    result = json.loads(done.stdout.splitlines()[-1])
    seconds = result["seconds_per_step"] * arch.layers / layers
    return {
        **result,
        "status": "measured",
        "seconds_per_step": rounded(seconds),
        "tokens_per_second": rounded(batch * length / seconds),
    }


def _row(peer: dict[str, Any]) -> tuple[str, str, str, str, str]:
    if peer["status"] != "measured":
        return peer["peer"], peer["status"], "", "", ""
    peaks = [peer["peak_allocated_bytes"], peer["peak_reserved_bytes"]]
    allocated, reserved = ("" if peak is None else gib(peak) for peak in peaks)
    return peer["peer"], f"{peer['tokens_per_second']:,.0f}", f"{peer['seconds_per_step']:.3f}", allocated, reserved
