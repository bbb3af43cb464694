"""What the files of a run say, where something is made of them later: a card, a push, an adapter's report, or a
comparison on the run's held-out conversations.

`finetune train` writes them; whoever reads them here may have another release's, or damaged ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune.checkpoint import read_json
from finetune.errors import FinetuneError, OutputError
from finetune.recipe import Recipe
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


def held_out_loss(summary: Mapping[str, Any]) -> str | None:
    """What a summary says of the held-out loss, and when it was measured: `5.413 before training, 4.200 after`."""
    before, after, step = (summary.get(name) for name in ("eval_loss_first", "eval_loss_last", "eval_step_last"))
    if step is None and after is not None:
        before = None  # a run of an earlier version, whose first evaluation may have been any
    said = [] if before is None else [f"{before:.3f} before training"]
    if after is not None:
        said.append(f"{after:.3f} after" + (f" step {step}" if step not in (None, summary["steps"]) else ""))
    return ", ".join(said) or None
