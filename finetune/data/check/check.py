"""`finetune data check`: what a recipe's data teaches, before a GPU is touched; and rows as the model reads them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.console import Report
from finetune.data.chat import apply_template
from finetune.data.check.fix import write_fixed
from finetune.data.check.report import document
from finetune.data.check.show import show_examples, show_report
from finetune.data.prepare import Part, prepare_data
from finetune.data.rows import IGNORED
from finetune.disk import require_fresh, write_text
from finetune.moe import BaseSpec, check_base, load_tokenizer_of
from finetune.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ON_THE_PAGE = 12


def check_data(
    recipe: Recipe,
    report: Report,
    *,
    name: str,
    show: int = 0,
    html: Path | None = None,
    fix: Path | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """Prepares the data as `finetune train` would, after the same checks of the model, and shows the report.

    Args:
        name: the recipe's file, as the page calls it.
        show: so many examples of each part.
        html: where to write the same as one page.
        fix: folder for a corrected copy.

    Raises:
        FinetuneError: the model, its tokenizer or the data cannot be read; the folder for the copy is taken.
    """
    if fix is not None:
        require_fresh(fix)
    begun = time.perf_counter()
    base = BaseSpec(recipe.model.path, recipe.model.revision, recipe.quantization.attention)
    _, arch = check_base(base, recipe.model.attn_implementation)
    tokenizer = load_tokenizer_of(base, arch)
    template = apply_template(tokenizer, recipe.data.template)
    prepared = prepare_data(recipe, tokenizer)
    made = document(
        recipe,
        prepared,
        name=name,
        template=template,
        seconds=time.perf_counter() - begun,
        price_per_hour=price_per_hour,
    )
    show_report(report, made)
    if show:
        made["examples"] = examples(prepared.parts, tokenizer, count=show)
        show_examples(report, made["examples"])
    if html is not None:
        from finetune.data.check.page import render_page  # draws with matplotlib

        drawn = examples(prepared.parts, tokenizer, count=max(show, _ON_THE_PAGE))
        write_text(html, render_page(made, drawn))
        report.line(f"page: {html}")
    if fix is not None:
        made["fixes"] = write_fixed(recipe, fix)
        for file, about in made["fixes"].items():
            report.line(f"{fix / file}: {about['written']:,} of {about['rows']:,} rows")
    return made


# ---- examples -------------------------------------------------------------------------------------------------------


def examples(
    parts: list[Part], tokenizer: PreTrainedTokenizerBase, *, count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` rows of each part, drawn by `seed`: part, where, tokens, supervised, and pieces of text with marks."""
    found = []
    for part in parts:
        rows = [(number, index) for number, chosen in enumerate(part.chosen) for index in chosen.tolist()]
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
        for number, index in (rows[i] for i in drawn):
            source = part.sources[number]
            row = source.dataset[index]
            supervised = np.array(row["labels"]) != IGNORED
            found.append(
                {
                    "part": part.name,
                    "where": source.ledger.at(row["position"]),
                    "tokens": len(row["input_ids"]),
                    "supervised": int(supervised.sum()),
                    "pieces": pieces(tokenizer, row["input_ids"], supervised),
                }
            )
    return found


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], supervised: np.ndarray) -> list[dict[str, Any]]:
    """Stretches of tokens that are alike in being supervised and being control tokens; their texts join to the whole.

    A piece is what decoding one more stretch adds to the text, since a tokenizer drops the space at a beginning.
    """
    special = np.isin(ids, tokenizer.all_special_ids)
    changes = np.flatnonzero((np.diff(supervised) != 0) | (np.diff(special) != 0) | (special[1:] & special[:-1])) + 1
    found, before = [], ""
    for begin, end in zip([0, *changes], [*changes, len(ids)], strict=True):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one row is decoded to one text"
        found.append(
            {"text": text[len(before) :], "supervised": bool(supervised[begin]), "control": bool(special[begin])}
        )
        before = text
    return found
