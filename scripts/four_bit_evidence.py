"""What 4-bit experts cost a tune: the same runs on NF4 and on 16-bit experts, and non-MoE training beside them.

    python scripts/upcycle_smollm2.py outputs/smollm2-moe
    python scripts/four_bit_evidence.py outputs/smollm2-moe --out bench/results/cpu/four_bit.json

Three kinds of run, from each seed: attention LoRA on NF4 experts, the same on the checkpoint's own experts, and every
parameter outside of the experts on NF4 experts. Attention is in 16 bits in all three, so the first two differ by the
experts' bits alone: both are the run of `finetune train`, and in the second the checkpoint's experts take the quantized
ones' place before the first step. Same rows in the same order, same tokens. The seed draws the adapter and the order.
On a CPU everything is computed in float32, on a GPU in bfloat16.

Every run ends as one JSON line in --out; what the file holds already is not run again. Adapters on NF4 experts are
saved in --runs, to be merged and compared. Leaves out a search for learning rates: each kind has the one given here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.console import Report
from finetune.data.rows import IGNORED
from finetune.disk import staged
from finetune.export.quantized import write_quantized
from finetune.moe.arch import MoeArch
from finetune.moe.experts import QuantizedExperts
from finetune.recipe.load import load_recipe
from finetune.recipe.origin import provenance
from finetune.train.run import Prepared, prepare, run_steps

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "tiny-mixtral"
# Name, what it is called in the table, trainable.method, learning rate.
KINDS = {
    "nf4": ("attention LoRA, NF4 experts", "attention_lora", 1e-3),
    "16bit": ("attention LoRA, 16-bit experts", "attention_lora", 1e-3),
    "non_moe": ("non-MoE, NF4 experts", "non_moe", 1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="16-bit checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--languages", nargs="+", default=["en"], help="of the bundled instruction set")
    parser.add_argument("--runs", type=Path, default=Path("outputs/four-bit-evidence"))
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    args = parser.parse_args()
    for seed in args.seeds if not args.table else ():
        for kind in KINDS:
            about = {"bench": "four-bit", "base": args.base.name, "kind": kind, "seed": seed, "epochs": args.epochs}
            about |= {"languages": args.languages}
            if not any(about.items() <= run.items() for run in lines(args.out)):
                measured = run_one(args, kind, seed)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**about, **measured, **provenance()}) + "\n")
    show(lines(args.out))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []


def run_one(args: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """Trains one run and measures it on the held-out conversations, before and after."""
    _, method, learning_rate = KINDS[kind]
    settings = {
        "model.path": str(quantized_once(args).resolve()),
        "quantization.attention": "16bit",
        "trainable.method": method,
        "data.train": str(in_languages("train", args)),
        "data.eval": str(in_languages("heldout", args)),
        "training.learning_rate": learning_rate,
        "training.num_train_epochs": args.epochs,
        "training.per_device_train_batch_size": 4,
        "training.eval_on_start": False,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.logging_steps": 4,
        "training.seed": seed,
        "router.log": False,
        "output.dir": str(args.runs / f"{kind}-{seed}"),
    }
    recipe = load_recipe(
        RECIPES / "qlora-attention.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )
    ready = prepare(recipe, Report(), overwrite=True)
    if kind == "16bit":
        put_checkpoint_experts(ready, args.base)
    # Before its first step every seed's run is the base: LoRA begins at zero.
    before = held_out_loss(ready)[0] if seed == args.seeds[0] else None
    start = time.perf_counter()
    metrics = run_steps(ready, recipe)
    seconds, history = time.perf_counter() - start, ready.trainer.state.log_history
    after, supervised = held_out_loss(ready)
    if kind != "16bit":
        with staged(ready.run.adapter, replace=True) as folder:
            ready.trainer.save_tuned(folder, ready.trainer.tuned_tensors())
    return {
        "loss_before": before,
        "loss": after,
        "held_out_tokens": supervised,
        "train_tokens": int(next(log["num_tokens"] for log in reversed(history) if "num_tokens" in log)),
        "steps": ready.trainer.state.global_step,
        "train_loss": metrics["train_loss"],
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "device": ready.trainer.args.device.type,
    }


def in_languages(part: str, args: argparse.Namespace) -> Path:
    """The conversations of the bundled set in the languages asked for, as a file."""
    kept = [
        line
        for line in (RECIPES / "data" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        if json.loads(line)["language"] in args.languages
    ]
    path: Path = args.runs / f"{part}-{'-'.join(args.languages)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path.resolve()


def quantized_once(args: argparse.Namespace) -> Path:
    """The base with NF4 experts and 16-bit attention, as a run would make it of the checkpoint again and again."""
    folder: Path = args.runs / f"{args.base.name}-nf4"
    if not folder.is_dir():
        write_quantized(str(args.base), folder, attention="16bit")
    return folder


@torch.no_grad()
def held_out_loss(ready: Prepared) -> tuple[float, int]:
    """Mean negative log-likelihood, nats, of the supervised held-out tokens, and their number."""
    trainer = ready.trainer
    model, total, count = trainer.model.eval(), 0.0, 0
    for batch in trainer.get_eval_dataloader():
        labels = batch.pop("labels")
        targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        logits = model(**batch).logits.float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    return total / count, count


def put_checkpoint_experts(ready: Prepared, base: Path) -> None:
    """The experts of the 16-bit checkpoint, frozen, in the place of the quantized ones: the values that were rounded
    to bf16, in the dtype that the run computes in."""
    trainer = ready.trainer
    dtype = torch.float32 if trainer.args.device.type == "cpu" else torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    places = [(name, module) for name, module in trainer.model.named_modules() if isinstance(module, QuantizedExperts)]
    assert len(places) == MoeArch.from_config(original.config.to_dict()).layers
    for name, _ in places:
        experts = original.get_submodule(name.removeprefix("base_model.model."))
        trainer.model.set_submodule(name, experts.requires_grad_(False).to(trainer.args.device))


def show(runs: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds, and the paired difference to the run on 16-bit experts."""
    reference = {run["seed"]: run["loss"] for run in runs if run["kind"] == "16bit"}
    rows = []
    for kind, (title, _, _) in KINDS.items():
        of_kind = [run for run in runs if run["kind"] == kind]
        if not of_kind:
            continue
        paired = [run["loss"] - reference[run["seed"]] for run in of_kind if run["seed"] in reference]
        rows.append(
            (
                title,
                next((f"{run['loss_before']:.4f}" for run in of_kind if run["loss_before"] is not None), ""),
                spread([run["loss"] for run in of_kind]),
                "" if kind == "16bit" or not paired else spread(paired, sign="+"),
                f"{mean(run['train_tokens'] for run in of_kind):,.0f}",
                ", ".join(str(seed) for seed in sorted(run["seed"] for run in of_kind)),
            )
        )
    columns = ("run", "held-out loss before", "after, nats", "against 16-bit experts", "tokens", "seeds")
    Report().table("Mean and standard deviation over the seeds", columns, rows)


def spread(values: list[float], sign: str = "") -> str:
    around = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.4f}{around}"


if __name__ == "__main__":
    main()
