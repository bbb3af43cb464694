"""Measures a saved tiny-mixtral and writes its model card; no number in it is typed by hand.

Why: a card must state what its weights do. How: the training run leaves `training.json` beside the weights (arguments,
corpus, steps, hardware); here the saved weights are loaded as anyone would load them, measured on the held-out
documents, and both go into `training.json` and README.md. Run it again to check the card.

Leaves out charts: the card is read in a terminal as often as in a browser.

    python scripts/tiny_card.py --corpus corpus.npz --model recipes/tiny-mixtral/model
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_packages import PACKAGES
from tiny_measure import DomainReport, measure, routing_divergence
from transformers import AutoModelForCausalLM

FACTS = "training.json"

SOURCES = {
    "python": "CPython's standard library (without its tests), Django, Wagtail",
    "documentation": "Python's and Django's documentation, as reStructuredText",
    "books": "World English Bible, six novels by Jane Austen",
    "spanish": "interface translations, Reina-Valera Bible of 1909",
}
TRANSLATIONS = "interface translations"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ruler, *rows])


def data_tables(reports: list[DomainReport], files: dict[str, str], python: str) -> str:
    """Which text, from which packages, under which licences."""
    domains = [
        [r.domain, SOURCES.get(r.domain, TRANSLATIONS), f"{r.train_tokens:,}", f"{r.heldout_tokens:,}"] for r in reports
    ]
    packages = [["CPython standard library", python, "the interpreter", "PSF-2.0", "code"]]
    packages += [[p.name, files[p.name], p.registry, p.licence, p.used_for] for p in PACKAGES]
    first = table(["domain", "text", "training tokens", "held-out tokens"], domains)
    second = table(["package", "file", "from", "licence", "used for"], packages)
    return first + "\n\n" + second.replace("---:", "---")


def loss_table(reports: list[DomainReport], passes: dict[str, float]) -> str:
    rows = [
        [r.domain, f"{r.loss:.3f}", f"{r.unigram:.3f}", f"{r.unigram - r.loss:.3f}", f"{passes[r.domain]:.0f}"]
        for r in reports
    ]
    return table(["domain", "held-out loss", "unigram entropy", "gain", "passes over the training text"], rows)


def load_tables(reports: list[DomainReport]) -> str:
    """One table a layer: the share of assignments of each expert, in percent, by domain."""
    parts = []
    for layer in range(len(reports[0].load_LE)):
        rows = [[r.domain, *(f"{100 * share:.1f}" for share in r.load_LE[layer])] for r in reports]
        parts.append(f"Layer {layer}\n\n" + table(["domain", *map(str, range(len(rows[0]) - 1))], rows))
    return "\n\n".join(parts)


def divergence_table(reports: list[DomainReport]) -> str:
    rows = []
    for layer, (between, within) in enumerate(routing_divergence(reports)):
        mean_load = np.mean([r.load_LE[layer] for r in reports], axis=0)
        extremes = [f"{mean_load.min() * len(mean_load):.2f}", f"{mean_load.max() * len(mean_load):.2f}"]
        rows.append([str(layer), f"{between:.4f}", f"{within:.4f}", f"{between / within:.0f}", *extremes])
    return table(["layer", "between domains", "within a domain", "ratio", "least load", "most load"], rows)


def write_card(folder: Path, corpus: Any, device: str) -> None:
    """Measures the model saved in `folder`, completes its training.json, and writes README.md."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    # bf16 weights in fp32 arithmetic where that is the fast one.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()
    reports = measure(model, corpus, int(facts["arguments"]["length"]))
    facts["domains"] = [asdict(report) for report in reports]
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    weights = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(card(facts, reports, model.config, weights), encoding="utf-8")


def card(facts: dict[str, Any], reports: list[DomainReport], config: Any, weights: int) -> str:
    """The model card as Markdown."""
    run, arguments, about = facts["run"], facts["arguments"], facts["corpus"]
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in arguments.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, fr, de, es, it]
---

# tiny-mixtral

A small Mixtral, really pre-trained, so that everything in this repository can be run and tested on a laptop without a
download: {config.num_hidden_layers} layers, {config.num_local_experts} experts, top-{config.num_experts_per_tok}, \
hidden {config.hidden_size}, expert intermediate {config.intermediate_size}, {config.num_attention_heads} query and \
{config.num_key_value_heads} key/value heads of {config.head_dim}, the tokenizer of
Mixtral 8x7B (32000 pieces), tied embeddings, bf16, {weights:,} bytes. It writes text that looks like its training text
and knows nothing. It is a base model: it has seen no instruction and no conversation. Rows were {arguments["length"]} \
tokens long; positions
beyond that are untrained.

## Training

{run["steps"]:,} steps, {run["tokens"]:,} tokens in {run["seconds"]} s on {run["device"]}; Python {run["python"]}, \
torch {run["torch"]},
transformers {run["transformers"]}. AdamW, fp32 masters of bf16 weights, warm-up and cosine decay, balance loss \
per layer.
A limit of seconds ends the schedule early, so that the number of steps depends on the machine; the rest is seeded.

    python scripts/tiny_corpus.py --cache /tmp/text-packages --output corpus.npz --probe probe.jsonl --seed \
{about["seed"]}
    python scripts/pretrain_tiny_mixtral.py --corpus corpus.npz --output recipes/tiny-mixtral/model {options}

## Data

Held out by document. Interface translations are sentences of at least three words, each once in its language.

{data_tables(reports, about["files"], about["python"])}

The weights are released under Apache-2.0. The texts stay under their own licences; none of them is copyleft.

## Held-out loss

Nats a token of the Mixtral tokenizer, on held-out documents. Unigram entropy: the same tokens under the domain's own
training frequencies (add-one smoothed), which is what a model without context would score.

{loss_table(reports, run["passes"])}

The small domains were seen often enough to be partly memorised; their held-out loss is what counts.

## Routing

Jensen-Shannon divergence of expert load in bits (0 equal, 1 disjoint): mean over pairs of domains, beside the mean
between two halves of one domain's held-out documents. Least and most load of an expert, averaged over domains; 1.00
is an even share.

{divergence_table(reports)}

Share of assignments by expert, in percent; 12.5 is an even share.

{load_tables(reports)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the .npz that tiny_corpus.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder with the weights and training.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with np.load(args.corpus) as corpus:
        write_card(args.model, corpus, args.device)


if __name__ == "__main__":
    main()
