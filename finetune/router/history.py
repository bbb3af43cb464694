"""What a run's files say about its routers, read into plain numbers: for figures and reports, long after the run.

Why: the figures at the end of a run and the page that is made later show the same numbers, and a run may have been
killed, resumed, or watched with less than everything. How: `metrics.jsonl` and the files of `router/` become windows of
training and held-out tokens, drifts, the base's band and alarms. Steps that were taken twice count once, as they were
taken last. What a file does not hold is empty or None here, never made up; a file that cannot be understood is said.

Shape suffixes: L layers, E experts. Loads are f, shares that sum to 1 over the experts of a layer.

Leaves out: drawing (plots.py), and what the numbers mean (the report).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checkpoint import read_json
from finetune.errors import OutputError
from finetune.jsonl import read_metrics
from finetune.router.metrics import LAYER_METRICS
from finetune.runfolder import RunFolder

DRIFT_METRICS = ("overlap", "top1_agreement", "kl", "js_load", "load_change")
_BRIEF = re.compile(r"router/((?:prompt/|completion/|aux/)?[a-z_0-9]+)")
Values = list[float | None]
# What a metric cannot leave, so that a band does not either.
_BOUNDS = {
    "max_vio": (0.0, math.inf),
    "load_cv": (0.0, math.inf),
    "load_entropy": (0.0, 1.0),
    "token_entropy": (0.0, math.inf),
    "z_loss": (0.0, math.inf),
    "repeat_first": (0.0, 1.0),
    "repeat_any": (0.0, 1.0),
}


@dataclass(frozen=True)
class Window:
    """One log: what the routers did with `tokens` tokens up to `step`.

    Attributes:
        load: f [L][E].
        layers: [L] for each of `LAYER_METRICS` that was logged; None where a value was not finite.
        scalars: the brief scalars by name without `router/`, e.g. `completion/max_vio_worst`, `aux/balance`.
    """

    step: int
    tokens: int
    load: list[list[float]]
    layers: dict[str, Values]
    scalars: dict[str, float]

    def worst(self, name: str) -> tuple[int, float] | None:
        """Layer and value of the largest of a metric."""
        return max_of(self.layers.get(name, []))

    @property
    def dead(self) -> set[tuple[int, int]]:
        """(layer, expert) below a tenth of an even share."""
        return {
            (layer, expert)
            for layer, row in enumerate(self.load)
            for expert, share in enumerate(row)
            if share * len(row) < 0.1
        }


@dataclass(frozen=True)
class DriftPoint:
    """Distance from the base on the probe at a step: [L] for each of `DRIFT_METRICS`."""

    step: int
    layers: dict[str, Values]


@dataclass(frozen=True)
class Base:
    """The untuned model on the probe (`router/base.json`).

    Attributes:
        noise_floor: MaxVio that the probe's number of tokens shows by chance.
        spread: standard deviation of a metric between windows of `window_tokens` tokens, [L] each.
    """

    name: str
    rows: int
    top_k: int
    noise_floor: float
    spread: dict[str, Values]
    window_tokens: int
    window: Window

    def band(self, name: str, layer: int, tokens: float) -> tuple[float, float] | None:
        """The base's value -+ two standard deviations at so many tokens a window; None where it is not known."""
        value = at(self.window.layers.get(name, []), layer)
        spread = at(self.spread.get(name, []), layer)
        if value is None or spread is None or tokens <= 0:
            return None
        reach = 2 * spread * math.sqrt(self.window_tokens / tokens)
        least, most = _BOUNDS.get(name, (-math.inf, math.inf))
        return max(least, value - reach), min(most, value + reach)


@dataclass(frozen=True)
class AlarmLine:
    """A line of `router/alarms.jsonl`."""

    step: int
    alarm: str
    layer: int
    expert: int | None
    value: float | None
    action: str
    message: str


@dataclass(frozen=True)
class ColouredText:
    """Tokens of the probe with their first experts, base and tuned: [layers][tokens], `layers` of the whole."""

    layers: list[int]
    pieces: list[str]
    base: list[list[int]]
    tuned: list[list[int]]


@dataclass(frozen=True)
class RouterHistory:
    """All of it, in the order of the steps.

    Attributes:
        loss, held_out_loss: (step, nats per token).
        has_router: whether any log carries router metrics.
    """

    train: list[Window] = field(default_factory=list)
    held_out: list[Window] = field(default_factory=list)
    drift: list[DriftPoint] = field(default_factory=list)
    base: Base | None = None
    alarms: list[AlarmLine] = field(default_factory=list)
    texts: list[ColouredText] = field(default_factory=list)
    loss: list[tuple[int, float | None]] = field(default_factory=list)
    held_out_loss: list[tuple[int, float | None]] = field(default_factory=list)

    @property
    def windows(self) -> list[Window]:
        base = [] if self.base is None else [self.base.window]
        return [*base, *self.train, *self.held_out]

    @property
    def layers(self) -> int:
        return len(self.windows[0].load)

    @property
    def experts(self) -> int:
        return len(self.windows[0].load[0])

    @property
    def has_router(self) -> bool:
        return bool(self.train or self.held_out)

    @property
    def window_tokens(self) -> float:
        """Tokens of a usual training window: the median."""
        tokens = sorted(window.tokens for window in self.train)
        return float(tokens[len(tokens) // 2]) if tokens else 0.0


def read_history(run: RunFolder) -> RouterHistory:
    """Reads a run's metrics and the files of its `router` folder, as many as there are.

    Raises:
        OutputError: a file holds something else than it should; says which, and what.
    """
    records = without_repeats(read_metrics(run.metrics)) if run.metrics.is_file() else []
    history = RouterHistory(
        train=[window for record in records if (window := _window(record, ""))],
        held_out=[window for record in records if (window := _window(record, "eval_"))],
        drift=[point for record in records if (point := _drift(record))],
        base=_read(run.router / "base.json", _base, "the report then does without the base's band"),
        alarms=_alarms(run.router / "alarms.jsonl"),
        texts=_read(run.router / "texts.json", _texts, "the report then does without coloured text") or [],
        loss=[(record["step"], number(record["loss"])) for record in records if "loss" in record],
        held_out_loss=[(record["step"], number(record["eval_loss"])) for record in records if "eval_loss" in record],
    )
    shapes = {(len(window.load), *{len(row) for row in window.load}) for window in history.windows}
    if len(shapes) > 1:
        raise OutputError(
            "the logs of this run are of routers of different sizes",
            where=f"{run.metrics} and {run.router}: "
            + ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)),
            allowed="one number of layers and of experts",
            fix="a folder holds one run: move files of other runs away",
        )
    return history


def without_repeats(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines in the order of steps; of steps that were taken again after a restart, the last time."""
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        same = len(kept)
        while same and kept[same - 1]["step"] == record["step"]:
            same -= 1
        kept[same:] = [line for line in kept[same:] if _kind(line) != _kind(record)] + [record]
    return kept


def max_of(values: Sequence[float | None]) -> tuple[int, float] | None:
    """Index and value of the largest that is known."""
    known = [(value, -index) for index, value in enumerate(values) if value is not None]
    return (-max(known)[1], max(known)[0]) if known else None


def at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _kind(record: Mapping[str, Any]) -> str:
    """What a line tells: a step's training, an evaluation, or the end."""
    return "eval" if "eval_loss" in record else "loss" if "loss" in record else "end"


def _window(record: Mapping[str, Any], prefix: str) -> Window | None:
    """The window that a log describes under a prefix; None where it has no load."""
    load: list[list[float]] = []
    while isinstance(row := record.get(f"{prefix}router/layer_{len(load):02d}/load"), list):
        load.append([number(share) or 0.0 for share in row])
    if not load:
        return None
    layers: dict[str, Values] = {}
    for name in LAYER_METRICS:
        vector = record.get(f"{prefix}router/by_layer/{name}")
        if isinstance(vector, list) and len(vector) == len(load):
            layers[name] = [number(value) for value in vector]
        elif f"{prefix}router/layer_00/{name}" in record:
            layers[name] = [
                number(record.get(f"{prefix}router/layer_{layer:02d}/{name}")) for layer in range(len(load))
            ]
    scalars = {
        match[1]: value
        for key, raw in record.items()
        if (match := _BRIEF.fullmatch(key.removeprefix(prefix))) and key.startswith(f"{prefix}router/")
        if (value := number(raw)) is not None
    }
    return Window(record["step"], int(scalars.get("tokens", 0)), load, layers, scalars)


def _drift(record: Mapping[str, Any]) -> DriftPoint | None:
    vectors = {name: record.get(f"router/drift/by_layer/{name}") for name in DRIFT_METRICS}
    layers = {name: [number(value) for value in vector] for name, vector in vectors.items() if vector is not None}
    return DriftPoint(record["step"], layers) if layers else None


def _read(path: Path, parse: Any, without: str) -> Any:
    """What a JSON file of the router folder holds; None where there is none.

    Raises:
        OutputError: it does not hold what it should.
    """
    if not path.is_file():
        return None
    try:
        return parse(read_json(path, kind=OutputError))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise OutputError(
            f"a file of this run cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            allowed="the file as `finetune train` wrote it",
            fix=f"restore it, or remove it: {without}",
        ) from error


def _base(document: Mapping[str, Any]) -> Base:
    layers = document["layers"]
    probe = document["probe"]
    window = Window(
        step=0,
        tokens=int(probe["tokens"]),
        load=[[float(share) for share in layer["load"]] for layer in layers],
        layers={name: [number(layer[name]) for layer in layers] for name in LAYER_METRICS if name in layers[0]},
        scalars={},
    )
    return Base(
        name=str(probe["name"]),
        rows=int(probe["rows"]),
        top_k=int(document["top_k"]),
        noise_floor=float(document["noise_floor"]),
        spread={name: [number(value) for value in values] for name, values in document["spread"].items()},
        window_tokens=int(document["window_tokens"]),
        window=window,
    )


def _alarms(path: Path) -> list[AlarmLine]:
    if not path.is_file():
        return []
    return [
        AlarmLine(
            line["step"],
            str(line.get("alarm")),
            int(line["layer"]) if number(line.get("layer")) is not None else 0,
            int(line["expert"]) if number(line.get("expert")) is not None else None,
            number(line.get("value")),
            str(line.get("action")),
            str(line.get("message")),
        )
        for line in read_metrics(path)
    ]


def _texts(document: Mapping[str, Any]) -> list[ColouredText]:
    layers = [int(layer) for layer in document["layers"]]
    texts = []
    for text in document["texts"]:
        pieces = [str(piece) for piece in text["pieces"]]
        base, tuned = ([[int(expert) for expert in row] for row in text[side]] for side in ("base", "tuned"))
        if any(len(rows) != len(layers) or any(len(row) != len(pieces) for row in rows) for rows in (base, tuned)):
            raise ValueError("a text has not one expert a token and layer")
        texts.append(ColouredText(layers, pieces, base, tuned))
    return texts
