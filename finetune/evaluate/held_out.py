"""Which conversations a comparison is made on: those that a command names, else the held-out ones of the run whose
folder the adapter lies in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.console import Report
from finetune.data import (
    Reading,
    Source,
    Supervision,
    encode_source,
    held_out_name,
    held_out_rows,
    open_source,
    readings_of,
)
from finetune.errors import AdapterError
from finetune.evaluate.divergence import Row
from finetune.recipe import Recipe
from finetune.run_files import recorded_recipe
from finetune.runfolder import RunFolder, run_of


@dataclass(frozen=True)
class HeldOut:
    """Conversations before they are read.

    name: what they are taken from; None where there are none.
    recipe: of the run, where the command names no data.
    """

    name: str | None
    recipe: Recipe | None

    @classmethod
    def find(cls, model: Path, data: str | None) -> HeldOut:
        """Finds them and opens their source, so that a fault is said before a model loads.

        Args:
            model: the folder of a run or of an adapter, a run's or not.
            data: what the command names instead.

        Raises:
            FinetuneError: the run or the source cannot be read.
        """
        if data is not None:
            open_source(Source(data))
            return cls(data, None)
        run_file = RunFolder(run_of(model)).run_file
        if not run_file.is_file():
            return cls(None, None)
        recipe = recorded_recipe(run_file, kind=AdapterError, fix="name conversations with --data")
        if recipe.data.evaluates:
            open_source(readings_of(recipe)[-1].source)
        return cls(held_out_name(recipe), recipe)

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_rows: int, report: Report | None = None) -> list[Row]:
        """At most `max_rows` tokenized rows; none where there is nothing to compare on.

        Args:
            report: told which of the conversations that a command names cannot be used; training told of a run's.

        Raises:
            FinetuneError: as `encode_source`.
        """
        if self.recipe is not None:
            rows = held_out_rows(self.recipe, tokenizer)
        elif self.name is not None:
            encoded = encode_source(Reading(Source(self.name, max_rows=max_rows)), tokenizer, Supervision())
            rows = encoded.dataset
            if report is not None:
                for reason, refused in encoded.ledger.refused.items():
                    first = encoded.ledger.at(refused.positions[0])
                    report.line(
                        f"warning: {refused.rows:,} of {encoded.ledger.rows:,} rows not used: {reason} ({first})"
                    )
        else:
            rows = None
        return [] if rows is None else list(rows.select(range(min(max_rows, len(rows)))))
