"""What every merge keeps of a tune, in one table: trains, merges to each format, compares, and rounds the update.

    python scripts/measure_fidelity.py --out bench/results/cpu/fidelity.json
    python scripts/measure_fidelity.py --adapter RUN/adapter --out FILE

Without --adapter it trains recipes/tiny-mixtral/qlora-attention.yaml first (2 minutes on two cores). The models go
through `finetune evaluate --compare` and `--survival`. One more row is the live adapter itself, computed in bfloat16 as
a GPU would: what the arithmetic alone changes. Prints a table, then writes the JSON line. Nothing is kept but that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.adapter.adapter import load
from finetune.console import Report
from finetune.evaluate.compare import compare
from finetune.evaluate.held_out import HeldOut
from finetune.evaluate.models import Compared, open_compared
from finetune.moe.load import LoadedModel
from finetune.recipe.origin import provenance

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "tiny-mixtral" / "qlora-attention.yaml"
# Folder -> what `finetune merge` is told.
MERGES = {
    "nf4": ("--format", "nf4"),
    "nf4, attention fp16": ("--format", "nf4", "--attention", "fp16"),
    "bf16": ("--format", "bf16"),
    "fp16": ("--format", "fp16"),
    "bf16, onto the original": ("--format", "bf16", "--onto", "original"),
}
IN_BFLOAT16 = "the live adapter itself, computed in bfloat16"
SCALES = (0.003, 0.01, 0.03, 0.1)


class InBfloat16(Compared):
    """The same model, computed in bfloat16."""

    def load(self, device: str) -> LoadedModel:
        loaded = load(self.folder, base_path=self.base, device=device, dtype="bfloat16")
        loaded.model.eval()
        return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="in the folder of a run that holds conversations out")
    parser.add_argument("--original", help="the 16-bit checkpoint, where the adapter's base is a quantized folder")
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=list(MERGES), metavar="NAME")
    parser.add_argument("--max-rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, adapter = Path(scratch), args.adapter
        if adapter is None:
            finetune("train", RECIPE, "--set", f"output.dir={folder / 'run'}")
            adapter = folder / "run" / "adapter"
        for name in args.merges:
            options = MERGES[name]
            original = ("--original", args.original) if args.original and "original" in options else ()
            finetune("merge", adapter, "--output", folder / name, *options, *original)
        document = finetune("evaluate", adapter, "--survival", *(x for s in SCALES for x in ("--scale-to", s)))
        held_out = HeldOut.find(adapter, None)
        models = open_compared(str(adapter), ["base", *(str(folder / name) for name in args.merges), str(adapter)])
        models[-1] = InBfloat16(**{**vars(models[-1]), "name": IN_BFLOAT16})
        named = [replace(model, name=Path(model.name).name) for model in models]
        comparison = compare(named, held_out, max_rows=args.max_rows)
    report = Report()
    show(comparison.to_dict()["models"], report)
    about = {"bench": "fidelity", "adapter": "tiny-mixtral" if args.adapter is None else str(args.adapter)}
    compared = comparison.to_dict()
    if compared["held_out"] is not None:
        compared["held_out"] = os.path.relpath(compared["held_out"], REPOSITORY)
    for size in document["survival"]:
        del size["projections"]  # hundreds of them
    found = {"comparison": compared, "survival": document["survival"], **provenance()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, **found}) + "\n", encoding="utf-8")


def finetune(*args: object) -> dict[str, Any]:
    """Runs a command of the toolkit with --json, and ends with its message if it fails."""
    print("finetune", *args, flush=True)
    command = [sys.executable, "-m", "finetune", *map(str, args), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def show(models: list[dict[str, Any]], report: Report) -> None:
    def cell(model: dict[str, Any], key: str, form: str) -> str:
        return "" if model[key] is None else f"{model[key]['value']:{form}}"

    columns = {
        "loss": ".4f",
        "kl": ".1e",
        "greedy_agreement": ".2%",
        "top_k_overlap": ".2%",
        "routed_alike": ".2%",
        "kl_routed_alike": ".1e",
    }
    rows = [(model["model"], *(cell(model, key, form) for key, form in columns.items())) for model in models]
    report.table("Against the live adapter", ("model", *columns), rows)


if __name__ == "__main__":
    main()
