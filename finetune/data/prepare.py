"""A recipe's data section to training rows: read, tokenized, deduplicated, held out, mixed, packed.

    sources ──encode──► rows on the disk ──keep──► without duplicates ──hold out──► train │ held-out ──mix──► ──pack──►

Every step after the first selects among rows that lie on the disk. `finetune train` and `finetune data check` both take
this path, so the report counts the very rows that train. The trainer is told to leave them as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from finetune.data.batching import pack
from finetune.data.pipeline import EncodedSource, Ledger, Reading, encode_source
from finetune.data.selection import duplicates_of, hold_out, interleave, leaked, near_leaks
from finetune.data.sources import Source
from finetune.data.worker import Supervision
from finetune.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PROCESSES = 16
_DEFAULT_LENGTH = 1024  # TRL's max_length


@dataclass
class Part:
    """Rows of one purpose before they are packed, and how they came about.

    `sources[i]` is where `chosen[i]` were taken from; `rows` is all of them, in the order of the mixture.
    """

    name: str
    sources: list[EncodedSource]
    weights: list[float | None]
    chosen: list[np.ndarray]
    exact: int = 0
    near: int | None = None
    removed: int = 0
    drawn: bool = False  # from the sources of another part
    given: int = 0  # conversations that were drawn from this one
    rows: Dataset = field(init=False)

    @property
    def ledgers(self) -> list[Ledger]:
        return [source.ledger for source in self.sources]

    def column(self, name: str) -> np.ndarray:
        """A column of counts over all chosen rows, source by source."""
        parts = [
            np.asarray(source.dataset.data.column(name).to_numpy())[chosen]
            for source, chosen in zip(self.sources, self.chosen, strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def signatures(self) -> list[bytes]:
        """Of all chosen rows, source by source."""
        columns = [(source.dataset.data.column("signature"), chosen) for source, chosen in self.pairs()]
        return [value for column, chosen in columns for value in column.take(pa.array(chosen)).to_pylist()]

    def pairs(self) -> Iterator[tuple[EncodedSource, np.ndarray]]:
        return zip(self.sources, self.chosen, strict=True)

    def conversations(self) -> list[int]:
        """For each source the conversations that the chosen rows are of; a long one may have several rows."""
        positions = [source.dataset.data.column("position").to_numpy() for source in self.sources]
        return [len(np.unique(of_source[chosen])) for of_source, chosen in zip(positions, self.chosen, strict=True)]

    def fingerprint(self) -> str:
        """A digest of the chosen conversations in order, wherever they lie and however they are tokenized."""
        made = hashlib.blake2b(digest_size=16)
        for keys in self.row_keys():
            made.update(b"".join(keys))
        return made.hexdigest()

    def row_keys(self) -> list[list[bytes]]:
        return [_keys(source, chosen) for source, chosen in zip(self.sources, self.chosen, strict=True)]


@dataclass(frozen=True)
class PreparedData:
    """Rows as they train: columns input_ids and labels, and seq_lengths where they are packed."""

    train: Dataset
    held_out: Dataset | None
    parts: list[Part]
    leaked_rows: list[str]  # held-out conversations that are in train too
    near_leaks: int | None  # held-out rows that are near one of train; None where nothing near is looked for
    cached: bool

    def named(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Where the rows of training that have these tokens were read: `train.jsonl line 3`; not those cut by packing.

        Args:
            rows: tokens, without padding.
        """
        wanted = {np.asarray(row, np.int32).tobytes() for row in rows}
        lengths = sorted({len(row) for row in rows})
        found: list[str] = []
        for source, chosen in self.parts[0].pairs():
            tokens, positions = (source.dataset.data.column(name).to_numpy() for name in ("tokens", "position"))
            for index in chosen[np.isin(tokens[chosen], lengths)].tolist():
                if np.asarray(source.dataset[index]["input_ids"], np.int32).tobytes() in wanted:
                    found.append(source.ledger.at(int(positions[index])))
        return list(dict.fromkeys(found))


def max_length_of(recipe: Recipe) -> int | None:
    """Tokens of a row at most; TRL's default where the recipe says nothing."""
    return recipe.training.get("max_length", _DEFAULT_LENGTH)


def processes_of(recipe: Recipe) -> int:
    """Processes that tokenize: as the recipe says, else one for each core that this process may use."""
    asked = recipe.training.get("dataset_num_proc")
    return asked or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """All rows of a recipe.

    Args:
        tokenizer: with the recipe's chat template on it.

    Raises:
        DataError: a source cannot be read, or leaves nothing to train on.
    """
    data = recipe.data
    train, held_out = _part("train", _train_readings(recipe), recipe, tokenizer), None
    reading = _held_out_reading(recipe)
    if reading is not None:
        held_out = _part("held-out", [(reading, None)], recipe, tokenizer)
    _deduplicate(train, data.deduplicate)
    if data.eval_fraction is not None or data.eval_rows is not None:
        held_out = _draw_held_out(train, recipe)
    parts = [train] if held_out is None else [train, held_out]
    for part in parts:
        part.rows = _mixed(part, recipe)
    found = [] if held_out is None else _leaks(train, held_out)
    max_length, training = max_length_of(recipe), recipe.training
    packed = bool(training.get("packing"))
    eval_packing = training.get("eval_packing")
    return PreparedData(
        _final(train, max_length if packed else None, recipe),
        None
        if held_out is None
        else _final(held_out, max_length if (packed if eval_packing is None else eval_packing) else None, recipe),
        parts,
        found,
        None if held_out is None or data.deduplicate != "near" else _near_leaks(train, held_out),
        all(source.cached for part in parts for source in part.sources),
    )


def held_out_name(recipe: Recipe) -> str | None:
    """What the held-out conversations are taken from; None without any."""
    return (recipe.data.eval or recipe.data.train) if recipe.data.evaluates else None


def held_out_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The held-out rows alone, not packed; arguments and errors as for `prepare_data`."""
    reading = _held_out_reading(recipe)
    if reading is not None:
        part = _part("held-out", [(reading, None)], recipe, tokenizer)
        return _mixed(part, recipe)
    parts = prepare_data(recipe, tokenizer).parts if recipe.data.evaluates else []
    return parts[1].rows if parts else None


def _train_readings(recipe: Recipe) -> list[tuple[Reading, float | None]]:
    """What is trained on, each with its weight in the mixture; None without one."""
    data = recipe.data
    source = Source(data.train, data.train_split, data.max_rows, data.streaming)
    first = Reading(source, data.format, dict(data.columns), dict(data.roles))
    readings: list[tuple[Reading, float | None]] = [(first, data.train_weight if data.more else None)]
    for more in data.more:
        source = Source(more.path, more.split, more.max_rows, data.streaming)
        readings.append((Reading(source, more.format, dict(more.columns), dict(more.roles)), more.weight))
    return readings


def _held_out_reading(recipe: Recipe) -> Reading | None:
    data = recipe.data
    if data.eval is None and data.eval_split is None:
        return None
    source = Source(data.eval or data.train, data.eval_split or "train", data.max_eval_rows, data.streaming)
    return Reading(source, data.format, dict(data.columns), dict(data.roles))


def readings_of(recipe: Recipe) -> list[Reading]:
    """Every source that the recipe names."""
    held_out = _held_out_reading(recipe)
    return [reading for reading, _ in _train_readings(recipe)] + ([] if held_out is None else [held_out])


def _part(
    name: str, readings: list[tuple[Reading, float | None]], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Part:
    data = recipe.data
    supervision = Supervision(data.loss_on, max_length_of(recipe), data.too_long, signatures=data.deduplicate == "near")
    sources = [
        encode_source(
            reading, tokenizer, supervision, processes=processes_of(recipe), name=Path(reading.source.path).name
        )
        for reading, _ in readings
    ]
    chosen = [np.arange(len(source.dataset)) for source in sources]
    return Part(name, sources, [weight for _, weight in readings], chosen)


def _deduplicate(part: Part, how: str) -> None:
    """Counts duplicates, and takes them out where the recipe asks for it; the first of equal conversations stays."""
    keys = [key for of_source in part.row_keys() for key in of_source]
    # Positions of different sources must differ: neighbours with one key and one position are one conversation.
    source_of = np.repeat(np.arange(len(part.chosen)), [len(chosen) for chosen in part.chosen])
    positions = part.column("position") * len(part.chosen) + source_of
    signatures = part.signatures() if how == "near" else None
    exact, near = duplicates_of(keys, positions, signatures)
    part.exact, part.near = int(exact.sum()), None if near is None else int(near.sum())
    if how == "off":
        return
    gone = exact if near is None else exact | near
    part.removed = int(gone.sum())
    begin = 0
    for number, chosen in enumerate(part.chosen):
        part.chosen[number] = chosen[~gone[begin : begin + len(chosen)]]
        begin += len(chosen)


def _draw_held_out(train: Part, recipe: Recipe) -> Part:
    """Moves a share of the conversations of `train` into a part of their own."""
    keys = [key for of_source in train.row_keys() for key in of_source]
    seed = recipe.training.get("seed", 42)
    kept, held = hold_out(keys, fraction=recipe.data.eval_fraction, count=recipe.data.eval_rows, seed=seed)
    bounds = np.cumsum([0, *map(len, train.chosen)])
    all_chosen = train.chosen

    def of_source(indices: np.ndarray) -> list[np.ndarray]:
        return [
            chosen[np.sort(indices[(indices >= begin) & (indices < end)]) - begin]
            for chosen, begin, end in zip(all_chosen, bounds[:-1], bounds[1:], strict=True)
        ]

    held_out = Part("held-out", train.sources, [None] * len(train.sources), of_source(held), drawn=True)
    train.chosen, train.given = of_source(kept), sum(held_out.conversations())
    return held_out


def _mixed(part: Part, recipe: Recipe) -> Dataset:
    sets = [
        source.dataset if len(chosen) == len(source.dataset) else source.dataset.select(chosen)
        for source, chosen in zip(part.sources, part.chosen, strict=True)
    ]
    sets = [rows.select_columns(["input_ids", "labels"]) for rows in sets]
    weights = [weight for weight in part.weights if weight is not None]
    return interleave(
        sets, weights or None, seed=recipe.training.get("seed", 42), stopping_strategy=recipe.data.mixture
    )


def _leaks(train: Part, held_out: Part) -> list[str]:
    """Where the held-out conversations are that `train` holds too."""
    seen = [key for keys in train.row_keys() for key in keys]
    found = []
    for source, keys, chosen in zip(held_out.sources, held_out.row_keys(), held_out.chosen, strict=True):
        positions = np.asarray(source.dataset.data.column("position").to_numpy())[chosen]
        found += [source.ledger.at(int(positions[i])) for i in np.flatnonzero(leaked(seen, keys))]
    return list(dict.fromkeys(found))


def _near_leaks(train: Part, held_out: Part) -> int:
    return int(near_leaks(train.signatures(), held_out.signatures()).sum())


def _final(part: Part, pack_to: int | None, recipe: Recipe) -> Dataset:
    rows = part.rows
    if part.name == "train" and recipe.training.get("shuffle_dataset"):
        rows = rows.shuffle(seed=recipe.training.get("seed", 42))
    if pack_to is None:
        return rows
    return pack(rows, pack_to, strategy=recipe.training.get("packing_strategy", "bfd"))


def _keys(source: EncodedSource, chosen: np.ndarray) -> list[bytes]:
    column: Any = source.dataset.data.column("key")
    keys = column.to_pylist()
    return keys if len(chosen) == len(keys) else [keys[i] for i in chosen]
