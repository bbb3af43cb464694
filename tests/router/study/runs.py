"""Run folders as a training run leaves them, written by hand: loads, curves, drift, texts and alarms of any size.

Every number is a formula of layer, expert and step, so a test can say what it must be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

INJECTED = "<script>alert(1)</script><img src=x onerror=alert(2)>"
HARD = ["<s>", ' 1 < 2 & "x"', "\n", "\u202e", "\x1b[31m", " שלום", " 日本", INJECTED, "</s>"]
METRICS = (
    "max_vio", "min_utilization", "max_utilization", "load_cv", "load_entropy", "token_entropy", "top1_prob", "z_loss",
    "balance_loss", "dead_experts", "repeat_first", "repeat_any",
)  # fmt: skip
Load = Callable[[int, int], list[float]]  # of layer and step


def tilted(experts: int, tilt: float = 0.2) -> Load:
    """The first expert gets `tilt` of an even share more, the last as much less; a little more in deeper layers."""

    def load(layer: int, step: int) -> list[float]:
        extra = tilt * (1 + 0.02 * layer) / experts
        return [1 / experts + extra, *([1 / experts] * (experts - 2)), 1 / experts - extra]

    return load


def collapsing(experts: int, layer: int, by: int) -> Load:
    """As `tilted`, but the last expert of one layer loses all to the first until the step `by`."""
    usual = tilted(experts)

    def load(at: int, step: int) -> list[float]:
        shares = usual(at, step)
        if at == layer:
            moved = shares[-1] * min(1.0, step / by)
            shares[0] += moved
            shares[-1] -= moved
        return shares

    return load


def metrics_of(load: Sequence[float], *, step: int = 0) -> dict[str, float]:
    """The metrics of a load, those of it exactly, the others some numbers."""
    experts = len(load)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return {
        "max_vio": max(load) * experts - 1,
        "min_utilization": min(load) * experts,
        "max_utilization": max(load) * experts,
        "load_cv": math.sqrt(sum((share * experts - 1) ** 2 for share in load) / experts),
        "load_entropy": entropy / math.log(experts),
        "token_entropy": 1.2 + 0.001 * step,
        "top1_prob": 0.5,
        "z_loss": 9.0 + 0.01 * step,
        "balance_loss": 1.0 + (max(load) * experts - 1) / 10,
        "dead_experts": sum(share * experts < 0.1 for share in load),
        "repeat_first": 0.25,
        "repeat_any": 0.6,
    }


def window(step: int, loads: Sequence[Sequence[float]], *, tokens: int = 4096, prefix: str = "") -> dict[str, Any]:
    """What a log carries of the routers."""
    layers = [metrics_of(load, step=step) for load in loads]
    line: dict[str, Any] = {
        f"{prefix}router/max_vio_worst": max(layer["max_vio"] for layer in layers),
        f"{prefix}router/max_vio_mean": sum(layer["max_vio"] for layer in layers) / len(layers),
        f"{prefix}router/tokens": tokens,
        f"{prefix}router/completion/max_vio_worst": 0.3,
        f"{prefix}router/prompt/max_vio_worst": 0.4,
    }
    line |= {f"{prefix}router/layer_{at:02d}/load": list(load) for at, load in enumerate(loads)}
    line |= {f"{prefix}router/by_layer/{name}": [layer[name] for layer in layers] for name in METRICS}
    return line


def drift(layers: int, strength: float) -> dict[str, Any]:
    """Drift that grows with the layer and with `strength` (0 is the base)."""
    grown = [strength * (1 + layer / layers) for layer in range(layers)]
    values = {
        "overlap": [1 - 0.05 * each for each in grown],
        "top1_agreement": [1 - 0.08 * each for each in grown],
        "kl": [0.02 * each for each in grown],
        "js_load": [0.002 * each for each in grown],
        "load_change": [0.06 * each for each in grown],
    }
    return {f"router/drift/by_layer/{name}": vector for name, vector in values.items()}


def write_run(
    folder: Path,
    *,
    layers: int = 6,
    experts: int = 8,
    top_k: int = 2,
    steps: Sequence[int] = tuple(range(10, 110, 10)),
    evaluations: Sequence[int] = (0, 50, 100),
    load: Load | None = None,
    base: bool = True,
    texts: Sequence[Sequence[str]] = (("<s>", " one", " two", " three"), HARD),
    alarms: Sequence[Mapping[str, Any]] = (),
    recipe: Mapping[str, Any] | None = None,
    router: bool = True,
) -> Path:
    """A run folder; without `router` it logged the loss only."""
    load = load or tilted(experts)
    folder.mkdir(parents=True, exist_ok=True)
    at = lambda step: [load(layer, step) for layer in range(layers)]  # noqa: E731
    lines: list[dict[str, Any]] = []
    for step in sorted({*steps, *evaluations}):
        if step in steps:
            lines.append({"step": step, "loss": 4.0 - 0.01 * step, **(window(step, at(step)) if router else {})})
        if step in evaluations:
            held_out = {"step": step, "eval_loss": 4.2 - 0.01 * step, "eval_runtime": 1.0}
            held_out |= window(step, at(step), prefix="eval_") if router else {}
            lines.append(held_out | (drift(layers, min(step / 50, 2.0)) if base and router else {}))
    write_lines(folder / "metrics.jsonl", lines)
    write_json(
        folder / "run.json",
        {
            "recipe": recipe
            or {
                "model": {"path": "models/<b>some</b>"},
                "trainable": {"method": "attention_lora", "router": False},
                "training": {"learning_rate": 2e-4},
                "router": {
                    "log": True,
                    "probe_tokens": 4096,
                    "alarms": {"action": "warn", "load_change": 10.0, "entropy": 0.5},
                },
            },
            "packages": {"torch": "2.13.0", "wandb": None},
            "python": "3.11.2",
            "platform": "Linux x86_64",
            "git": {"commit": "abcdef0123456789", "dirty": True},
        },
    )
    (folder / "recipe.yaml").write_text("model:\n  path: models/<b>some</b>\n", encoding="utf-8")
    if base and router:
        before = [load(layer, 0) for layer in range(layers)]
        write_json(
            folder / "router" / "base.json",
            {
                "probe": {"name": "held-out data", "rows": 20, "tokens": 4096},
                "top_k": top_k,
                "noise_floor": 0.04,
                "layers": [{"load": each, **metrics_of(each)} for each in before],
                "spread": {name: [0.05] * layers for name in METRICS},
                "window_tokens": 1024,
            },
        )
        shown = sorted({0, layers // 2, layers - 1})
        write_json(
            folder / "router" / "texts.json",
            {
                "layers": shown,
                "texts": [
                    {
                        "pieces": list(pieces),
                        "base": [[(at + layer) % experts for at in range(len(pieces))] for layer in shown],
                        # Every third token changes its expert.
                        "tuned": [
                            [(at + layer + (at % 3 == 2)) % experts for at in range(len(pieces))] for layer in shown
                        ],
                    }
                    for pieces in texts
                ],
            },
        )
    if alarms:
        write_lines(folder / "router" / "alarms.jsonl", alarms)
    return folder


def alarm(
    step: int, layer: int, *, kind: str = "load_change", expert: int | None = None, action: str = "warn"
) -> dict[str, Any]:
    return {
        "step": step,
        "alarm": kind,
        "layer": layer,
        "expert": expert,
        "value": 0.5,
        "base": 0.0,
        "threshold": 0.4,
        "action": action,
        "message": f"layer {layer}: something happened & <b>more</b>",
    }


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
