"""What training will learn from, counted: the report that makes a silent fault of the data loud.

Counts over `input_ids` and `labels` as they will be after truncation to `max_length` (TRL keeps the start), vectorized
over Arrow's own buffers. A turn is a stretch of supervised tokens; it is sound when its last one is the end of
sequence. Leaves out packing, duplicates and roles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.data.mask import IGNORED
from finetune.errors import DataError

_BATCH = 2000  # rows counted at a time


@dataclass(frozen=True)
class SupervisionReport:
    """Counts over a tokenized data set; all but `longest` and `supervised_tokens_uncut` are after truncation.

    `rows_unsupervised` have not one supervised token. `eos_supervised_turns` of the `supervised_turns` end with the
    end of sequence. `longest` is the longest row as it came, `rows_truncated` lost `tokens_truncated` to `max_length`.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    supervised_tokens_uncut: int
    supervised_turns: int
    eos_supervised_turns: int
    rows_unsupervised: int
    longest: int
    max_length: int | None
    rows_truncated: int
    tokens_truncated: int

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are learnt."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def table(self) -> list[tuple[str, str]]:
        """Label and value pairs for a table."""
        limit = "none" if self.max_length is None else f"{self.max_length:,}"
        return [
            ("conversations", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("supervised tokens", f"{self.supervised_tokens:,} ({self.supervised_share:.1%})"),
            ("turns with supervised end", f"{self.eos_supervised_turns:,} of {self.supervised_turns:,}"),
            ("conversations with nothing supervised", f"{self.rows_unsupervised:,}"),
            ("longest conversation", f"{self.longest:,} tokens (limit {limit})"),
            ("truncated conversations", f"{self.rows_truncated:,} ({self.tokens_truncated:,} tokens lost)"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Every count, for JSON."""
        return {**asdict(self), "supervised_share": self.supervised_share}


def audit(dataset: Dataset, *, eos_token_id: int, max_length: int | None = None) -> SupervisionReport:
    """Counts what a data set from `supervise` teaches after truncation to `max_length` (None: no truncation)."""
    total = np.zeros(9, dtype=np.int64)
    longest = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(_BATCH):
        ids_rows = table.column("input_ids").combine_chunks()
        lengths = ids_rows.value_lengths().to_numpy()
        ids = ids_rows.flatten().to_numpy()
        labels = table.column("labels").combine_chunks().flatten().to_numpy()
        assert len(ids) == len(labels) == lengths.sum(), "input_ids and labels of a row differ in length"
        total += _count(ids, labels, lengths, eos_token_id, max_length)
        longest = max(longest, int(lengths.max(initial=0)))
    rows, tokens, supervised, uncut, turns, eos_turns, unsupervised, truncated, lost = map(int, total)
    return SupervisionReport(
        rows=rows,
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_tokens_uncut=uncut,
        supervised_turns=turns,
        eos_supervised_turns=eos_turns,
        rows_unsupervised=unsupervised,
        longest=longest,
        max_length=max_length,
        rows_truncated=truncated,
        tokens_truncated=lost,
    )


def _count(
    ids_N: np.ndarray, labels_N: np.ndarray, lengths_R: np.ndarray, eos: int, max_length: int | None
) -> np.ndarray:
    """The counts of one batch of R rows with N tokens in all, in the order in which `audit` adds them up."""
    kept_R = lengths_R if max_length is None else np.minimum(lengths_R, max_length)
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    position_N = np.arange(len(ids_N)) - np.repeat(np.cumsum(lengths_R) - lengths_R, lengths_R)
    supervised_N = labels_N != IGNORED
    learnt_N = supervised_N & (position_N < kept_R[row_N])
    # A turn ends where the next token is not learnt or belongs to another row.
    goes_on_N = np.zeros_like(learnt_N)
    goes_on_N[:-1] = learnt_N[1:] & (row_N[1:] == row_N[:-1])
    ends_N = learnt_N & ~goes_on_N
    learnt_R = np.bincount(row_N[learnt_N], minlength=len(lengths_R))
    return np.array(
        [
            len(lengths_R),
            kept_R.sum(),
            learnt_N.sum(),
            supervised_N.sum(),
            ends_N.sum(),
            (ends_N & (ids_N == eos)).sum(),
            (learnt_R == 0).sum(),
            (kept_R < lengths_R).sum(),
            (lengths_R - kept_R).sum(),
        ],
        dtype=np.int64,
    )


def require_supervision(report: SupervisionReport, *, where: str = "data.train") -> None:
    """Refuses a data set that teaches nothing.

    Raises:
        DataError: not one token is supervised, or truncation has cut off every one that is.
    """
    if report.supervised_tokens:
        return
    if report.supervised_tokens_uncut:
        raise DataError(
            f"truncation to training.max_length {report.max_length} leaves nothing supervised: every one of "
            f"{report.rows} conversations is cut off before the assistant speaks",
            where=where,
            fix=f"raise training.max_length (the longest conversation has {report.longest} tokens)",
        )
    raise DataError(
        f"not one of {report.tokens} tokens in {report.rows} conversations is supervised",
        where=where,
        allowed="conversations whose assistant turns the chat template marks with {% generation %}",
        fix="set data.template: mistral-v1, and check that the conversations hold assistant turns",
    )
