"""`finetune router drift`: how far fine-tuning has moved the routing from the base's, on a fixed text.

Why: the base of an adapter is the same 4-bit model without it, so every difference is the tuning's. How: the base reads
the probe before anything is put on it, then the tuned model reads the same tokens; one base is in memory, and of its
routing the router logits of the probe (layers * experts * 2 or 4 bytes a token) in host memory. That serves LoRA,
trained routers and non-MoE tuning alike. A merged or other whole model is compared with the base that `--base` names,
one after the other.

Leaves out: the loss, and what moved the routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapter import Adapter, is_adapter, load
from finetune.console import Report
from finetune.disk import write_json
from finetune.errors import AdapterError, ModelError
from finetune.moe import BaseSpec, LoadedModel, MoeArch, load_base, load_tokenizer, read_config
from finetune.router.drift import DriftSums, chance_overlap, drift_scalars, drift_sums
from finetune.router.metrics import noise_floor
from finetune.router.study.probe import MAX_TOKENS, Probe, read_probe, require_writable, routed_rows, row_tokens

_BY_LAYER = ("overlap", "top1_agreement", "kl", "js_load", "load_change")


def router_drift(
    tuned: Path,
    report: Report,
    *,
    base: str | None = None,
    data: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures the drift of an adapter folder, or of a merged model against `base`, prints it and returns it.

    Args:
        base: the base, where it has moved since training; the model to compare with, where `tuned` is a whole model.
        data, max_tokens: the text, see `read_probe`.
        out: write the document there as JSON as well.

    Returns:
        `model`, `base`, `probe`, `top_k`, `experts`, `layers`, `chance_overlap`; `overall` and each of `domains` with
        `tokens`, `noise_floor` and one list over the layers for every number of a `Drift`; `base_load` and
        `tuned_load` [L][E].

    Raises:
        FinetuneError: nothing was tuned there, the base does not fit, or the text cannot be read.
    """
    require_writable("--out", out)
    probe, model = _opened(tuned, base=base, data=data, max_tokens=max_tokens, device=device)
    arch, base_path = model.arch, model.base.path
    # Kept in the router's own precision, as the tuned model's will come: ties between experts break alike.
    kept = [[x.cpu() for x in said.logits] for _, said in routed_rows(model, probe, title="Reading, base")]
    if is_adapter(tuned):
        model = Adapter.open(tuned, base=base).put_on(model)
    else:
        del model  # before the other one comes
        model = load(str(tuned), device=device)
    by_domain: dict[str, DriftSums] = {}
    tuned_rows = routed_rows(model, probe, title="Reading, tuned")
    for base_logits, (rows, said) in zip(kept, tuned_rows, strict=True):
        sums, domain = drift_sums(base_logits, [x.cpu() for x in said.logits], arch.top_k), rows[0].domain
        by_domain[domain] = by_domain[domain] + sums if domain in by_domain else sums
    document = {
        "model": str(tuned),
        "base": base_path,
        "probe": probe.describe(),
        "refused_rows": probe.refused,
        "top_k": arch.top_k,
        "experts": arch.experts,
        "layers": arch.layers,
        "chance_overlap": chance_overlap(arch.experts, arch.top_k),
        **_described(by_domain),
    }
    if out is not None:
        write_json(out, document)
    show_drift(document, report)
    return document


def _opened(
    tuned: Path, *, base: str | None, data: Sequence[str], max_tokens: int, device: str
) -> tuple[Probe, LoadedModel]:
    """The probe, and the base as it was; what can be wrong is said before anything loads."""

    def read(tokenizer_of: str, positions_of: str) -> Probe:
        tokenizer = load_tokenizer(tokenizer_of)
        return read_probe(tokenizer, data, max_tokens=max_tokens, row_tokens=row_tokens(positions_of))

    if is_adapter(tuned):
        adapter = Adapter.open(tuned, base=base)
        return read(adapter.tokenizer_of, adapter.require_base().path), adapter.load_base(device=device)
    if not (tuned / "config.json").is_file():
        raise AdapterError(
            "there is no adapter and no model",
            where=str(tuned),
            allowed="a folder that `finetune train` saved as <output.dir>/adapter, or a merged model with --base",
            fix="check the path",
        )
    if base is None:
        raise AdapterError(
            "this is a whole model, which does not name the base that it was tuned from",
            where=str(tuned),
            allowed="an adapter folder; a whole model together with --base",
            fix="name the base with --base",
        )
    shapes = [MoeArch.from_config(read_config(path), where=path) for path in (base, str(tuned))]
    if shapes[0] != shapes[1]:
        raise ModelError(
            "the two models are not of one shape",
            where=f"{tuned} and {base}",
            allowed=f"{shapes[0].layers} layers of {shapes[0].experts} experts, {shapes[0].top_k} a token, and all "
            "other sizes equal",
            fix="name the model that this one was tuned from with --base",
        )
    return read(base, base), load_base(BaseSpec(base), device=device)


def _described(by_domain: dict[str, DriftSums]) -> dict[str, Any]:
    total = next(iter(by_domain.values()))
    for sums in list(by_domain.values())[1:]:
        total = total + sums

    def numbers(sums: DriftSums) -> dict[str, Any]:
        floor = noise_floor(sums.tokens, sums.base_counts.shape[1], sums.top_k)
        return {"noise_floor": floor, **asdict(sums.drift())}

    def load(load_LE: Tensor) -> list[list[float]]:
        return [[round(f, 6) for f in row] for row in load_LE.tolist()]

    return {
        "overall": numbers(total),
        "scalars": drift_scalars(total.drift()),
        "domains": [{"name": name, **numbers(sums)} for name, sums in by_domain.items()],
        "base_load": load(total.base_load),
        "tuned_load": load(total.tuned_load),
    }


# ---- the tables -----------------------------------------------------------------------------------------------------


def show_drift(document: dict[str, Any], report: Report) -> None:
    """A table by layer, one by domain, and what they come to in a sentence."""
    overall, probe = document["overall"], document["probe"]
    report.table(
        f"Drift of {document['model']} from {document['base']}",
        ("layer", "top-k overlap", "top-1 agreement", "KL (nats)", "JS of load (nats)", "load change"),
        [(str(layer), *_numbers(*(overall[name][layer] for name in _BY_LAYER))) for layer in range(document["layers"])],
    )
    columns = ("domain", "tokens", "overlap", "worst layer", "top-1", "KL (nats)", "worst load change", "noise floor")
    report.table("By kind of text, mean of the layers", columns, [_domain_row(d) for d in document["domains"]])
    scalars = document["scalars"]
    report.line(
        f"Of the {document['top_k']} experts that the base chooses for a token, the tuned model keeps "
        f"{scalars['router/drift/overlap_mean']:.1%} (worst layer {scalars['router/drift/overlap_worst']:.1%}, "
        f"chance {document['chance_overlap']:.1%}). Over all text no expert's load changed by more than "
        f"{scalars['router/drift/load_change_worst']:.3f} of an even share; chance alone puts the busiest expert of "
        f"{probe['tokens']:,} tokens {overall['noise_floor']:.3f} above even."
    )
    if document["refused_rows"]:
        report.line(f"{document['refused_rows']:,} rows of {probe['name']} could not be read and are left out.")


def _domain_row(domain: dict[str, Any]) -> tuple[str, ...]:
    layers = len(domain["overlap"])
    return (
        domain["name"],
        f"{domain['tokens']:,}",
        f"{sum(domain['overlap']) / layers:.1%}",
        f"{min(domain['overlap']):.1%}",
        f"{sum(domain['top1_agreement']) / layers:.1%}",
        f"{sum(domain['kl']) / layers:.2e}",
        f"{max(domain['load_change']):.3f}",
        f"{domain['noise_floor']:.3f}",
    )


def _numbers(overlap: float, agreement: float, kl: float, js: float, change: float) -> tuple[str, ...]:
    return f"{overlap:.1%}", f"{agreement:.1%}", f"{kl:.2e}", f"{js:.2e}", f"{change:.3f}"
