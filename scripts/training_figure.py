"""Draws the training rows of recorded benches as bars: ours, what others reach, and the roofline of that GPU.

python scripts/training_figure.py bench/results/h100-80gb docs/training_speed.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS, ROOFLINE = "#2a6f97", "#adb5bd", "#c1121f"
PEERS = {"parametrization": "transformers +\nbitsandbytes", "liger": "the same\n+ Liger"}


def main(results: Path, target: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("train-*.json"))]
    runs.sort(key=lambda run: (run["method"], run["length"], run["batch"], run["memory"]["peak"]["allocated"]))
    peers = [peer for peer in json.loads((results / "peers.json").read_text())["peers"] if peer["status"] == "measured"]
    peers_at = [run for run in runs if (run["batch"], run["length"]) == (8, 1024)]

    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    labels = []
    for run in runs:
        if run is peers_at[0]:
            for peer in peers:
                _bar(axes, len(labels), peer["tokens_per_second"], OTHERS, peer["peak_allocated_bytes"])
                labels.append(f"{PEERS[peer['peer']]}\n8 x 1024")
        x, roofline = len(labels), run["roofline_tokens_per_second"]
        _bar(axes, x, run["trainer"]["tokens_per_second"], OURS, run["memory"]["peak"]["allocated"])
        axes.hlines(
            roofline, x - 0.4, x + 0.4, color=ROOFLINE, linewidth=2, label=None if x else "roofline of this GPU"
        )
        labels.append(f"moe-qlora\n{run['batch']} x {run['length']}" + _how(run))
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("tokens per second")
    device = runs[0]["device"].removeprefix("NVIDIA ")
    axes.set_title(f"Mixtral 8x7B, LoRA on attention (last bar: everything but the experts), one {device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(target, dpi=150)


def _how(run: dict[str, Any]) -> str:
    if run["method"] == "non_moe":
        return "\nnot the experts"
    return "\nin 34 GiB" if run["overrides"] else ""


def _bar(axes: Any, x: int, tokens_per_second: float, color: str, peak: float) -> None:
    axes.bar(x, tokens_per_second, color=color, width=0.7)
    text = f"{tokens_per_second:,.0f}\n{peak / 2**30:.0f} GiB"
    ink = "black" if color == OTHERS else "white"
    axes.text(x, tokens_per_second - 150, text, ha="center", va="top", fontsize=8, color=ink)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
