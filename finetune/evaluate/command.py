"""`finetune evaluate`: opens what the command names, measures, and shows it; what is wrong is said before a model
loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.adapter import Weighted, inspect_adapter, is_adapter, open_source
from finetune.console import Report
from finetune.errors import AdapterError
from finetune.evaluate.compare import Comparison, compare, require_data
from finetune.evaluate.held_out import HeldOut
from finetune.evaluate.intervals import CONFIDENCE, Estimate
from finetune.evaluate.models import open_compared
from finetune.evaluate.retention import ROUNDINGS, Survival, lost_in, survival

_COLUMNS = {"nf4": "nf4 again (as PEFT merges)", "bf16": "bf16", "fp16": "fp16"}


def run_evaluate(
    model: str,
    report: Report,
    *,
    others: Sequence[str] = (),
    survives: bool = False,
    scales: Sequence[float] = (),
    data: str | None = None,
    max_rows: int = 64,
    seed: int = 0,
    base: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures `model` and the others, shows tables, and returns the document.

    Args:
        survives: show what each format keeps of the adapter's update; without others, only that.
        scales: further sizes of the update, of the weight's norm.

    Returns:
        `comparison` (see `Comparison`, None with `survives` alone), `updates` (of every adapter, as `adapter inspect`
        has them), `survival` (as trained, then each scale) and `warnings`.

    Raises:
        FinetuneError: a model, the data or an option cannot be used.
    """
    _require_sensible(model, is_adapter=is_adapter(model), survives=survives, scales=scales)
    comparison: Comparison | None = None
    updates: list[dict[str, Any]] = []
    if others or not survives:
        held_out = HeldOut.find(Path(model), data)
        require_data(held_out, model)
        models = open_compared(model, others, base=base)
        adapters = [one.folder for one in models if one.kind == "adapter"]
        updates = [_update(folder, base) for folder in adapters]
    made: list[Survival] = []
    if is_adapter(model):
        made = survival(open_source([Weighted(Path(model))], onto="trained", base_path=base), [None, *scales])
    if survives and not made:
        raise AdapterError(
            "the adapter changes no weight, so there is no update to keep",
            where=model,
            allowed="an adapter that was trained for at least a step",
            fix="check the path",
        )
    if others or not survives:
        comparison = compare(models, held_out, max_rows=max_rows, seed=seed, device=device, report=report)
        _show_comparison(comparison, report)
        for update in updates:
            _show_update(update, report)
    if survives:
        _show_survival(model, made, report)
    warnings = lost_in(made[0]) if made else []
    for warning in warnings:
        report.line(f"warning: {warning}")
    return {
        "reference": model,
        "comparison": None if comparison is None else comparison.to_dict(),
        "updates": updates,
        "survival": [one.to_dict() for one in made],
        "warnings": warnings,
    }


def _require_sensible(model: str, *, is_adapter: bool, survives: bool, scales: Sequence[float]) -> None:
    if scales and not survives:
        raise AdapterError(
            "--scale-to belongs to --survival",
            where="command line",
            allowed="--survival --scale-to 0.01",
            fix="add --survival, or leave --scale-to out",
        )
    wrong = [scale for scale in scales if not 0 < scale <= 1]
    if wrong:
        raise AdapterError(
            f"{wrong[0]} is not a size of an update",
            where="--scale-to",
            allowed="a share of the weight's norm above 0, at most 1",
            fix="give a share like 0.01 for 1%",
        )
    if survives and not is_adapter:
        raise AdapterError(
            "there is no adapter, so there is no update to keep",
            where=model,
            allowed="an adapter folder, as `finetune train` saved it",
            fix="name the adapter that was merged",
        )


def _update(folder: str, base: str | None) -> dict[str, Any]:
    """The norms of `adapter inspect`, and all matrices of a layer as one."""
    layers = inspect_adapter(Path(folder), base_path=base)["layers"]
    return {"model": folder, "layers": [{**layer, **_of_layer(layer["norms"])} for layer in layers]}


def _of_layer(norms: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Frobenius norms of a layer's matrices taken together; None where one of them is not known."""
    updates, bases = ([norm[key] for norm in norms.values()] for key in ("update", "base"))
    update, base = _root(updates), _root(bases)
    return {"update": update, "base": base, "relative": update / base if update is not None and base else None}


def _root(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm**2 for norm in known)) if len(known) == len(norms) else None


# ---- the tables -----------------------------------------------------------------------------------------------------


def _show_comparison(comparison: Comparison, report: Report) -> None:
    report.line(
        f"{comparison.conversations:,} conversations of {comparison.held_out}: {comparison.tokens:,} tokens, of which "
        f"{comparison.supervised_tokens:,} supervised. In brackets {CONFIDENCE:.0%} intervals over conversations."
    )
    report.table(
        "Loss of the supervised tokens",
        ("model", "stored as", "loss (nats)", "perplexity", "loss against the first"),
        [
            (
                one.model,
                one.stored,
                _shown(one.loss, ".4f"),
                _shown(one.perplexity, ".4g"),
                _shown(one.loss_difference, "+.1e"),
            )
            for one in comparison.models
        ],
    )
    others = comparison.models[1:]
    if not others:
        return
    report.table(
        f"Against {comparison.models[0].model}, over all tokens",
        ("model", "KL (nats)", "greedy agreement", "top-k expert overlap", "tokens routed alike", "their KL"),
        [
            (
                one.model,
                _shown(one.kl, ".2e"),
                _shown(one.greedy_agreement, ".2%"),
                _shown(one.top_k_overlap, ".2%"),
                _shown(one.routed_alike, ".2%"),
                _shown(one.kl_routed_alike, ".2e"),
            )
            for one in others
        ],
    )
    by_layer = [one.top_k_overlap_by_layer or () for one in others]
    report.table(
        "Top-k expert overlap by layer",
        ("layer", *(one.model for one in others)),
        [(str(layer), *(_shown(e, ".2%") for e in row)) for layer, row in enumerate(zip(*by_layer, strict=True))],
    )


def _show_update(update: Mapping[str, Any], report: Report) -> None:
    report.table(
        f"Size of the update: {update['model']}",
        ("layer", "norm", "of the base's weights"),
        [
            (
                "others" if layer["layer"] is None else str(layer["layer"]),
                "-" if layer["update"] is None else f"{layer['update']:.4g}",
                "-" if layer["relative"] is None else f"{layer['relative']:.2%}",
            )
            for layer in update["layers"]
        ],
    )


def _show_survival(model: str, made: Sequence[Survival], report: Report) -> None:
    def cell(one: Survival, format: str) -> str:
        if format not in one.formats:
            return "-"
        kept = one.formats[format]
        return f"{kept.kept:.1%}\n{one.lowest[format]:.1%}, {kept.error:.2g}"

    report.table(
        f"Share of the update that is left: {model}",
        ("update, of the weights' norm", *(_COLUMNS[format] for format in ROUNDINGS)),
        [
            (
                f"{one.relative:.2%}" + ("\nas trained" if one.scale is None else ""),
                *(cell(one, format) for format in ROUNDINGS),
            )
            for one in made
        ],
    )
    report.line("Below each share the lowest of a projection, and the rounding's error in units of the update.")


def _shown(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}}\n[{estimate.low:{form}}, {estimate.high:{form}}]"
