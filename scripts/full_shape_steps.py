"""Trains a few steps of a full-shape model from random weights, through `finetune train`, without a checkpoint.

Takes a recipe, replaces its model by the shape in --shape (with the bundled tokenizer) and its data by the bundled
conversations joined into full rows, and prints one JSON line: tokens/s, peak device memory, census, versions.

    python scripts/full_shape_steps.py recipes/mixtral-8x7b/qlora-attention-80gb.yaml --batch 2 --length 1024 --steps 10
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
KEPT = ("steps", "tokens_per_second", "peak_device_bytes", "trainable_parameters", "census_bytes", "train_seconds")
TINY = REPOSITORY / "recipes" / "tiny-mixtral"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--shape", type=Path, default=REPOSITORY / "recipes" / "mixtral-8x7b" / "shape")
    parser.add_argument("--conversations", type=Path, default=TINY / "data" / "train.jsonl")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        shutil.copytree(args.shape, model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / "model" / name, model / name)
        write_full_rows(
            args.conversations, folder / "rows.jsonl", rows=args.batch * args.steps, characters=args.length * 8
        )
        settings = {
            "model.path": model,
            "data.train": folder / "rows.jsonl",
            "data.eval": "null",
            "data.eval_split": "null",
            "data.format": "messages",
            "training.eval_strategy": '"no"',
            "training.save_strategy": '"no"',
            "training.max_steps": args.steps,
            "training.logging_steps": 1,
            "training.per_device_train_batch_size": args.batch,
            "training.gradient_accumulation_steps": 1,
            "training.max_length": args.length,
            "output.dir": folder / "run",
        }
        overrides = [f"{key}={value}" for key, value in settings.items()] + args.overrides
        command = [sys.executable, "-m", "finetune", "train", str(args.recipe), "--random-weights", "--json"]
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        summary = json.loads(done.stdout)
        logs = map(json.loads, (folder / "run" / "metrics.jsonl").open())
        about = json.loads((folder / "run" / "run.json").read_text())
        result = {
            "recipe": str(args.recipe),
            "batch": args.batch,
            "length": args.length,
            **{name: summary[name] for name in KEPT},
            "losses": [line["loss"] for line in logs if "loss" in line],
            "census": json.loads((folder / "run" / "census.json").read_text())["rows"],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "packages": about["packages"],
        }
        print(json.dumps(result))
    return 0


def write_full_rows(source: Path, path: Path, *, rows: int, characters: int) -> None:
    """Conversations of at least `characters` characters, more than --length tokens, by joining those of `source`."""
    turns = [json.loads(line)["messages"] for line in source.open(encoding="utf-8")]
    at = 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages: list[dict[str, str]] = []
            size = 0
            while size < characters:
                pair = [m for m in turns[at % len(turns)] if m["role"] != "system"]
                at += 1
                messages += pair
                size += sum(len(message["content"]) for message in pair)
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
