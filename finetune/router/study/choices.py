"""What single tokens and pairs of experts do: experts' favourite tokens, and which experts are chosen together.

How: each pass adds to integer counts, layer by layer; ratios come last. Only tokens that occur `min_count` times are
counted one by one, so the counts need layers * kept tokens * experts * 4 bytes, on the host.

An expert's lift on a token is how much more often it takes the token than it takes any token. A pair's lift is how much
more often both are chosen than two independent choices without repetition would: plain independence would put every
pair of a top-2 router below 1, because the two choices are never the same expert.

Shape suffixes: L layers, N tokens, E experts, K experts per token, V kept tokens and, before them, all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_COUNT = 10


@dataclass(frozen=True)
class Favourite:
    """A token that an expert takes more often than others.

    Attributes:
        token: its id.
        count: how often it went to the expert, as any of its k.
        share: of the token's occurrences.
        lift: that share over the expert's share of all tokens.
    """

    token: int
    count: int
    share: float
    lift: float


class Choices:
    """Counts of the choices of tokens and pairs, filled stretch by stretch.

    Args:
        rows: the token ids that will be added, all of them.
        layers, experts: of the model.
        min_count: tokens that occur less often are no favourites.
    """

    def __init__(self, rows: Sequence[Sequence[int]], *, layers: int, experts: int, min_count: int = MIN_COUNT):
        ids, counts = torch.cat([torch.tensor(row) for row in rows]).unique(return_counts=True)
        self.kept = ids[counts >= min_count]
        self.occurrences = counts[counts >= min_count]
        # Place 0 is for all other tokens.
        self._place = torch.zeros(int(ids.max()) + 1, dtype=torch.int64)
        self._place[self.kept] = torch.arange(1, len(self.kept) + 1)
        self.tokens = 0
        self.pairs_LEE = torch.zeros(layers, experts, experts, dtype=torch.int64)
        self._taken_LVE = torch.zeros(layers, len(self.kept) + 1, experts, dtype=torch.int32)

    def add(self, ids: Sequence[int], indices: Sequence[Tensor]) -> None:
        """Adds tokens of any rows.

        Args:
            ids: the tokens.
            indices: chosen experts [N, K] of each layer, on any device.
        """
        place_N = self._place[torch.tensor(ids)]
        for layer, chosen_NK in enumerate(indices):
            chosen_NE = torch.zeros(len(ids), self.pairs_LEE.shape[1], dtype=torch.int32)
            chosen_NE.scatter_(1, chosen_NK.cpu(), 1)
            self._taken_LVE[layer].index_add_(0, place_N, chosen_NE)
            # Exact: float32 counts to 2^24, a pass has some thousand tokens.
            self.pairs_LEE[layer] += (chosen_NE.float().T @ chosen_NE.float()).long()
        self.tokens += len(ids)

    def favourites(self, *, top: int = 12) -> list[list[list[Favourite]]]:
        """For each layer and expert its tokens of a lift above 1: highest lift first, then the most frequent."""
        found = []
        for taken_VE, pairs_EE in zip(self._taken_LVE[:, 1:], self.pairs_LEE, strict=True):
            share_VE = taken_VE.double() / self.occurrences.unsqueeze(1)
            usual_E = pairs_EE.diagonal().double() / self.tokens
            # An expert that nothing went to has no favourites; its lift is 0 / 0.
            lift_VE = (share_VE / usual_E).nan_to_num(0.0)
            found.append([self._best(taken_VE[:, e], share_VE[:, e], lift_VE[:, e], top) for e in range(len(pairs_EE))])
        return found

    def coactivation_lift(self) -> Tensor:
        """How many times as often as by chance a pair is chosen, float64 [L, E, E].

        NaN on the diagonal and for unused experts. It is n_ij / N over p_i p_j (k - 1) / k * E / (E - 1), where p_i is
        the share of tokens that choose i, so that uniform choices of k without repetition give 1.
        """
        experts = self.pairs_LEE.shape[1]
        p_LE = self.pairs_LEE.diagonal(dim1=1, dim2=2).double() / self.tokens
        top_k = round(float(p_LE[0].sum()))
        without_repetition = (top_k - 1) / top_k * experts / (experts - 1)
        expected_LEE = p_LE.unsqueeze(2) * p_LE.unsqueeze(1) * without_repetition
        lift_LEE = self.pairs_LEE.double() / self.tokens / expected_LEE
        unused_LEE = (expected_LEE == 0) | torch.eye(experts, dtype=torch.bool)
        return lift_LEE.masked_fill(unused_LEE, float("nan"))

    def _best(self, taken_V: Tensor, share_V: Tensor, lift_V: Tensor, top: int) -> list[Favourite]:
        rows = [
            Favourite(int(self.kept[v]), int(taken_V[v]), float(share_V[v]), float(lift_V[v]))
            for v in (lift_V > 1).nonzero().flatten().tolist()
        ]
        return sorted(rows, key=lambda row: (-row.lift, -row.count, row.token))[:top]
