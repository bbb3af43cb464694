"""What the files of a run say, where something is made of them later: a card, a push, or a comparison on the run's
held-out conversations.

`finetune train` writes them; whoever reads them here may have another release's, or damaged ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from transformers import PreTrainedTokenizerBase

from finetune.checkpoint import read_json
from finetune.console import Report
from finetune.data import (
    Reading,
    Source,
    Teaching,
    encode_source,
    held_out_name,
    held_out_rows,
    open_source,
    readings_of,
)
from finetune.errors import AdapterError, FinetuneError, OutputError
from finetune.evaluate import Row
from finetune.recipe import Recipe
from finetune.runfolder import RunFolder
from finetune.values import FileSchema, check_object


class RunFile(FileSchema):
    """run.json."""

    recipe: dict[str, Any]
    packages: dict[str, str | None] | None = None


class SummaryFile(FileSchema):
    """summary.json."""

    steps: int
    stopped_by: str | None
    train_loss: float | None
    eval_loss_first: float | None
    eval_loss_last: float | None
    trainable_parameters: int


class _Source(FileSchema):
    where: str


class _Part(FileSchema):
    sources: list[_Source]
    examples: int
    tokens: int
    fingerprint: str | None = None


class DataFile(FileSchema):
    """data.json."""

    parts: Annotated[list[_Part], Field(min_length=1)]


class _Fidelity(FileSchema):
    tokens: int
    reference_loss: float = 0.0
    candidate_loss: float = 0.0
    kl: float = 0.0
    greedy_agreement: float = 0.0
    top_k_overlap: float = 0.0
    max_logit_difference: float = 0.0


class FidelityFile(FileSchema):
    """fidelity.json of a merged folder."""

    fidelity: _Fidelity | None = None


def recorded(file: Path, schema: type[FileSchema], *, kind: type[FinetuneError] = OutputError) -> dict[str, Any]:
    """A file of a run, checked.

    Raises:
        FinetuneError: of the given kind; it is missing or damaged, or does not hold what it should.
    """
    content = read_json(file, kind=kind)
    fix = "restore the file as `finetune train` wrote it"
    check_object(content, schema, kind=kind, name=file.name, where=str(file), fix=fix)
    return content


def recorded_recipe(file: Path, *, kind: type[FinetuneError], fix: str) -> Recipe:
    """The recipe in a run.json.

    Raises:
        FinetuneError: of the given kind; as `recorded`, or it is the recipe of another version.
    """
    try:
        return Recipe.model_validate(recorded(file, RunFile, kind=kind)["recipe"])
    except ValidationError as error:
        raise kind(
            "the run's recipe is of another version of this toolkit",
            where=f"{file}: {', '.join('.'.join(map(str, fault['loc'])) for fault in error.errors()[:5])}",
            allowed="a run that this version trained",
            fix=fix,
        ) from None


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
            model: an adapter folder, in a run's folder or not.
            data: what the command names instead.

        Raises:
            FinetuneError: the run or the source cannot be read.
        """
        if data is not None:
            open_source(Source(data))
            return cls(data, None)
        run_file = RunFolder(model.parent).run_file
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
            encoded = encode_source(Reading(Source(self.name, max_rows=max_rows)), tokenizer, Teaching())
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
