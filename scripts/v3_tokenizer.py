"""The Mistral v3 tokenizer out of the v1 one: the same pieces and merges, 768 control tokens set in after `</s>`.

Why: the v3 format has `[INST]` and `[/INST]` as tokens of their own, and its tokenizer would be another 3 MB in the
repository. `scripts/v3_fixture.py` compares the result with mistral-common's v3 model, piece by piece, before it writes
the fixture. Leaves out everything but Mixtral's tokenizer; on no other one does this mean anything.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

KEPT = 3  # <unk>, <s>, </s>


def shift(v1: str, controls: list[str]) -> Tokenizer:
    """The v3 tokenizer.

    Args:
        v1: `tokenizer.json` of Mixtral 8x7B.
        controls: the control tokens, `[INST]` first, by id.
    """
    parts: dict[str, Any] = json.loads(v1)
    vocabulary = {piece: i if i < KEPT else i + len(controls) for piece, i in parts["model"]["vocab"].items()}
    parts["model"]["vocab"] = vocabulary | {text: KEPT + i for i, text in enumerate(controls)}
    like = parts["added_tokens"][0]
    parts["added_tokens"] += [{**like, "id": KEPT + i, "content": text} for i, text in enumerate(controls)]
    return Tokenizer.from_str(json.dumps(parts))
