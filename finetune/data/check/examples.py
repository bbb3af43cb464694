"""Real rows as the model will read them, cut where what is learnt begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.prepare import Part
from finetune.data.rows import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            learnt = np.array(row["labels"]) != IGNORED
            found.append(
                {
                    "part": part.name,
                    "where": source.ledger.at(row["position"]),
                    "tokens": len(row["input_ids"]),
                    "supervised": int(learnt.sum()),
                    "pieces": pieces(tokenizer, row["input_ids"], learnt),
                }
            )
    return found


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], learnt: np.ndarray) -> list[dict[str, Any]]:
    """Stretches of tokens that are all learnt or all not, all control tokens or none; their texts join to the whole.

    A piece is what decoding one more stretch adds to the text, since a tokenizer drops the space at a beginning.
    """
    special = np.isin(ids, tokenizer.all_special_ids)
    changes = np.flatnonzero((np.diff(learnt) != 0) | (np.diff(special) != 0) | (special[1:] & special[:-1])) + 1
    found, before = [], ""
    for begin, end in zip([0, *changes], [*changes, len(ids)], strict=True):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one row is decoded to one text"
        found.append({"text": text[len(before) :], "supervised": bool(learnt[begin]), "control": bool(special[begin])})
        before = text
    return found
