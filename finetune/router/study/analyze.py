"""`finetune router analyze`: the routing study of the Mixtral paper (arXiv 2401.04088, section 5) for any MoE.

Why: whether experts follow languages, syntax or nothing shows in three things: the load by kind of text, how often
neighbouring tokens share an expert, and which tokens an expert takes. How: the model reads the probe once, row by row;
`RouterCapture` sums up each domain, `Choices` counts tokens and pairs. The document holds it all; the terminal
(`analyze_show.py`) and a page (`analyze_page.py`) show the first, the middle and the last layer, as the paper does.

Leaves out: comparing models (drift_command.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapter import load, open_tuned
from finetune.console import Report
from finetune.data import token_pieces
from finetune.disk import write_json, write_text
from finetune.moe import LoadedModel, MoeArch, load_tokenizer, read_config
from finetune.router.capture import RouterCapture
from finetune.router.metrics import LAYER_METRICS, RouterSums, layer_metrics, noise_floor, random_repetition
from finetune.router.study.analyze_page import render_analysis
from finetune.router.study.analyze_show import show_analysis
from finetune.router.study.choices import MIN_COUNT, Choices
from finetune.router.study.probe import MAX_TOKENS, Probe, read_probe, require_writable, routed_rows, row_tokens

TEXT_TOKENS = 160  # of the coloured beginning of each domain
# Table 5 of the Mixtral paper: shares of consecutive tokens with the same first expert, and with any expert in common.
PAPER: dict[str, Any] = {
    "model": "Mixtral 8x7B",
    "source": "arXiv 2401.04088, table 5",
    "layers": [0, 15, 31],
    "random": dict(zip(("repeat_first", "repeat_any"), random_repetition(8, 2), strict=True)),
    "first": {
        "ArXiv": [0.140, 0.279, 0.227],
        "DM Mathematics": [0.141, 0.284, 0.197],
        "GitHub": [0.149, 0.281, 0.197],
        "Gutenberg": [0.139, 0.261, 0.263],
        "PhilPapers": [0.136, 0.253, 0.221],
        "PubMed abstracts": [0.142, 0.246, 0.220],
        "StackExchange": [0.136, 0.272, 0.236],
        "Wikipedia": [0.144, 0.236, 0.253],
    },
    "any": {
        "ArXiv": [0.465, 0.623, 0.529],
        "DM Mathematics": [0.449, 0.670, 0.445],
        "GitHub": [0.499, 0.669, 0.492],
        "Gutenberg": [0.495, 0.631, 0.522],
        "PhilPapers": [0.469, 0.619, 0.513],
        "PubMed abstracts": [0.486, 0.616, 0.518],
        "StackExchange": [0.482, 0.646, 0.536],
        "Wikipedia": [0.498, 0.621, 0.518],
    },
}


def router_analyze(
    model: str,
    report: Report,
    *,
    base: str | None = None,
    data: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
    device: str = "auto",
    html: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Studies a model or adapter folder, or a hub id, prints the tables and returns the document.

    Args:
        base: of an adapter, where it has moved since training; a whole model needs none.
        data, max_tokens: the text, see `read_probe`.
        html: write one self-contained page there.
        out: write the document there as JSON as well.

    Raises:
        FinetuneError: the model has no experts or cannot be loaded, or the text cannot be read.
    """
    require_writable("--html", html)
    require_writable("--out", out)
    adapter = open_tuned(model, base=base)
    config_of = model if adapter is None else adapter.require_base().path
    tokenizer_of = model if adapter is None else adapter.tokenizer_of
    MoeArch.from_config(read_config(config_of), where=config_of)
    probe = read_probe(load_tokenizer(tokenizer_of), data, max_tokens=max_tokens, row_tokens=row_tokens(config_of))
    document = study(load(model, base_path=base, device=device), probe, name=model)
    if out is not None:
        write_json(out, document)
    show_analysis(document, report)
    if html is not None:
        write_text(html, render_analysis(document))
        report.line(f"page: {html}")
    return document


def study(loaded: LoadedModel, probe: Probe, *, name: str) -> dict[str, Any]:
    """The document of a loaded model on a probe.

    Keys: `model`, `probe`, `top_k`, `experts`, `layers`, `tokens`; `domains`, each with `name`, `tokens`,
    `noise_floor` and for each of `layers` the `load` [E] and every one of LAYER_METRICS; `overall`, the same of all
    text; `random` repetition; the `paper`'s table 5; `favourites` [L][E]; `coactivation` [L][E][E] (tokens that chose
    both; on the diagonal, that chose the expert) and its `coactivation_lift`; `texts` with the first expert of each
    token at the first, the middle and the last layer.
    """
    arch, tokenizer = loaded.arch, loaded.tokenizer
    shown = sorted({0, (arch.layers - 1) // 2, arch.layers - 1})
    choices = Choices([row.ids for row in probe.rows], layers=arch.layers, experts=arch.experts)
    sums: dict[str, RouterSums] = {}
    texts: dict[str, dict[str, Any]] = {}
    with RouterCapture(loaded.model, num_experts=arch.experts, top_k=arch.top_k) as capture:
        for rows, said in routed_rows(loaded, probe, title="Reading"):
            domain = rows[0].domain
            counted = capture.snapshot("eval")
            capture.reset("eval")
            sums[domain] = sums[domain] + counted if domain in sums else counted
            choices.add([token for row in rows for token in row.ids], said.indices)
            if domain not in texts:
                ids = rows[0].ids[:TEXT_TOKENS]
                texts[domain] = {
                    "domain": domain,
                    "layers": shown,
                    "pieces": token_pieces(tokenizer, ids),
                    "first": [said.indices[layer][: len(ids), 0].tolist() for layer in shown],
                }
    overall = next(iter(sums.values()))
    for of_domain in list(sums.values())[1:]:
        overall = overall + of_domain
    first, shared = random_repetition(arch.experts, arch.top_k)
    return {
        "model": name,
        "model_type": arch.model_type,
        "probe": probe.describe(),
        "refused_rows": probe.refused,
        "top_k": arch.top_k,
        "experts": arch.experts,
        "layers": arch.layers,
        "tokens": probe.tokens,
        "domains": [{"name": domain, **_of_text(counted)} for domain, counted in sums.items()],
        "overall": _of_text(overall),
        "random": {"repeat_first": first, "repeat_any": shared},
        "paper": PAPER,
        "favourites": _favourites(choices, loaded),
        "favourites_min_count": MIN_COUNT,
        "coactivation": choices.pairs_LEE.tolist(),
        "coactivation_lift": _rounded(choices.coactivation_lift()),
        "texts": list(texts.values()),
    }


def _of_text(sums: RouterSums) -> dict[str, Any]:
    return {
        "tokens": sums.tokens,
        "noise_floor": noise_floor(sums.tokens, sums.experts, sums.top_k),
        "layers": [
            {"load": [round(f, 6) for f in layer.load], **{name: vars(layer)[name] for name in LAYER_METRICS}}
            for layer in layer_metrics(sums)
        ],
    }


def _favourites(choices: Choices, loaded: LoadedModel) -> list[list[dict[str, Any]]]:
    """By layer and expert, with the tokens' texts."""
    spelled: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in spelled:
            spelled[token] = _spelling(loaded, token)
        return spelled[token]

    return [
        [
            {
                "expert": expert,
                "tokens": [
                    {"text": text(f.token), "share": round(f.share, 4), "lift": round(f.lift, 3), "count": f.count}
                    for f in liked
                ],
            }
            for expert, liked in enumerate(layer)
        ]
        for layer in choices.favourites()
    ]


def _spelling(loaded: LoadedModel, token: int) -> str:
    """A token's text in the middle of a text; its name in the vocabulary where it is part of a character."""
    tokenizer: Any = loaded.tokenizer
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    piece = token_pieces(tokenizer, [*anchor, token])[-1]
    return piece if piece and "\ufffd" not in piece else str(tokenizer.convert_ids_to_tokens(token))


def _rounded(x_LEE: Tensor) -> list[list[list[float | None]]]:
    """Nested lists to four digits, NaN as None."""
    return [[[None if x != x else round(x, 4) for x in row] for row in layer] for layer in x_LEE.tolist()]
