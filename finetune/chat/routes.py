"""The first expert of each token of a conversation, layer by layer, from one forward pass over what a model saw.

The engine runs the pass between two of its own steps, with the model's adapter active, so it need not wait for answers
to end. All layers are kept, so that looking at another layer needs no further pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data import token_pieces
from finetune.moe import LoadedModel
from finetune.router import Probe, ProbeRow, routed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.infer import Engine

# Spelling out takes the square of a stretch's length; a character has at most four tokens, so it lies within the few
# that a stretch has in common with the one before it.
_STRETCH, _COMMON = 256, 8


@dataclass(frozen=True)
class Routed:
    """A text with its routing.

    Attributes:
        ids: N tokens.
        pieces: what each token adds to the text.
        first: the most probable expert of each token, [L][N].
        experts: of a layer.
    """

    ids: list[int]
    pieces: list[str]
    first: list[list[int]]
    experts: int


def routed(engine: Engine, ids: Sequence[int], model: str) -> Routed:
    """The routing of token ids [N] by one of the engine's models.

    Raises:
        ModelError: the model has no routers.
    """

    def look(loaded: LoadedModel) -> Routed:
        probe = Probe("conversation", [ProbeRow("conversation", list(ids))])
        [(_, said)] = routed_rows(loaded, probe, title="Reading")
        first = [chosen[:, 0].tolist() for chosen in said.indices]
        return Routed(list(ids), pieces_of(loaded.tokenizer, ids), first, loaded.arch.experts)

    return engine.run(look, model)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """`token_pieces` of a long row, in time linear in its length."""
    pieces: list[str] = []
    for start in range(0, len(ids), _STRETCH):
        common = min(start, _COMMON)
        # Over the end as well, so that a character which the end would cut is whole.
        stretch = token_pieces(tokenizer, ids[start - common : start + _STRETCH + _COMMON])
        pieces += stretch[common : common + _STRETCH]
    return pieces
