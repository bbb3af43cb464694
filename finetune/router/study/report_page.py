"""A run's routing as one page: the verdict first, then the load, the curves, the drift, repetition and coloured text.

The page carries its style and drawings and asks nothing of the network; its content security policy forbids scripts
and requests, so a text that the model was trained on cannot make it do anything even if it slipped through the
escaping. Words are laid out here, curves in report_figures.py, heat maps in report_heat.py, the looks are in
`report.html.jinja`, `base.css.jinja` and `report.css.jinja`. Colour never stands alone: values and experts are in the
titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.data import counts, split_unseen, visible
from finetune.router.drift import chance_overlap
from finetune.router.history import AlarmLine, ColouredText, at
from finetune.router.metrics import random_repetition
from finetune.router.study.analyze import PAPER
from finetune.router.study.drawing import LESS, MORE
from finetune.router.study.report import RouterReport
from finetune.router.study.report_figures import (
    drift_plots,
    metric_figures,
    overview,
    repetition_plots,
    shown,
)
from finetune.router.study.report_heat import load_maps, training_panels
from finetune.router.study.verdict import far, setting, value_of

# Colours that are told apart; the next as many experts wear them hatched, and beyond that each has a hue of its own.
_COLOURS = 8
_ALARMS = 40
_OPEN_LAYERS = 8  # with so few layers all curves are open


@dataclass(frozen=True)
class Tile:
    """One number of the first screen; `fill` draws it as a bar."""

    label: str
    value: str
    note: str
    fill: float | None = None
    level: Literal["", "warning", "error"] = ""


@dataclass(frozen=True)
class AlarmGroup:
    """Alarms of one kind and place."""

    step: int
    last: int
    times: int
    kind: str
    message: str
    stopped: bool


@dataclass(frozen=True)
class Token:
    """A piece of text with its first expert; `style` is what colours it."""

    stretches: list[tuple[str, bool]]
    title: str
    style: str
    hue: str
    changed: bool


@dataclass(frozen=True)
class ColouredLayer:
    """All texts as one layer routes them: base beside tuned, and how many tokens changed their first expert."""

    layer: int
    tokens: int
    changed: int
    texts: list[tuple[list[Token], list[Token]]]


def render_report(made: RouterReport) -> str:
    """One self-contained HTML page of a run, to be written as UTF-8."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({"counts": counts, "visible": visible, "hue_of": _hue})
    history, base = made.history, made.history.base
    return environment.get_template("report.html.jinja").render(
        made=made,
        name=visible(made.name),
        chips=list(chips(made)),
        tiles=list(tiles(made)),
        alarms=alarm_groups(history.alarms),
        alarms_shown=_ALARMS,
        maps=[] if made.comparison is None else load_maps(made.comparison),
        panels=training_panels(history),
        logs=[window.step for window in history.train],
        metrics=metric_figures(made),
        all_open=history.layers <= _OPEN_LAYERS,
        overview=overview(made),
        drift=drift_plots(made),
        repetition=repetition_plots(made),
        repetition_rows=repetition_rows(made),
        random=None if base is None else random_repetition(history.experts, base.top_k),
        paper=PAPER,
        texts=coloured(history.texts, history.experts),
        legend=[_style(expert, history.experts) for expert in range(history.experts)] if history.experts <= 16 else [],
        versions=list(versions(made)),
        less=", ".join(map(str, LESS)),
        more=", ".join(map(str, MORE)),
        recipe=made.recipe_text,
    )


def chips(made: RouterReport) -> Iterator[tuple[str, str]]:
    """What the run was, in a few words."""
    recipe, history = made.about["recipe"], made.history
    given = {
        "model": setting(recipe, "model.path", None),
        "method": setting(recipe, "trainable.method", None),
        "learning rate": setting(recipe, "training.learning_rate", None),
    }
    for name, value in given.items():
        if value is not None:
            yield name, visible(f"{value:g}" if isinstance(value, float) else str(value))
    trained = setting(recipe, "trainable.router", False)
    rate = setting(recipe, "trainable.router_learning_rate", None)
    yield "router", ("trained" + (f" at {rate:g}" if rate is not None else "")) if trained else "frozen"
    if setting(recipe, "router.aux", "off") == "train":
        weights = (setting(recipe, f"router.{name}_coef", 0) for name in ("balance", "z"))
        yield "auxiliary loss", "balance {:g}, z {:g}".format(*weights)
    top_k = "" if history.base is None else f", top {history.base.top_k}"
    yield "routers", f"{counts(history.layers, 'layer')} of {counts(history.experts, 'expert')}{top_k}"
    yield "steps", f"{made.last_step:,}"


def tiles(made: RouterReport) -> Iterator[Tile]:
    """The numbers of the first screen."""
    history, compared = made.history, made.comparison
    state = history.train[-1] if history.train else history.held_out[-1]
    after = state if compared is None else compared.after
    before = None if compared is None else compared.before
    worst = after.worst("max_vio")
    was = None if before is None else value_of(before.worst("max_vio"))
    origin = "base" if compared is None or compared.with_base else "first log"
    tokens = "" if compared is None else "same tokens" if compared.same_tokens else "other tokens"
    note = f"layer {worst[0]}" if worst is not None else "not logged"
    if was is not None:
        note += f"; {origin} {was:.2f}, {tokens}"
    yield Tile("worst MaxVio", "—" if worst is None else f"{worst[1]:.2f}", note)
    dead = len(after.dead)
    more = before is not None and len(after.dead - before.dead) > 0
    of = f"of {history.layers * history.experts:,}"
    yield Tile(
        "dead experts",
        f"{dead:,}",
        of if before is None else f"{of}; {origin} {len(before.dead):,}",
        level="error" if more else "",
    )
    yield from _drift_tiles(made)
    alarms = history.alarms
    policy = setting(made.about["recipe"], "router.alarms.action", "warn")
    quiet = "alarms were off" if policy == "off" else "nothing to report"
    first = f"first at step {min(alarm.step for alarm in alarms):,}" if alarms else quiet
    yield Tile("alarms", f"{len(alarms):,}", first, level="error" if made.stopped_by else "warning" if alarms else "")
    held = [value for _, value in history.held_out_loss if value is not None]
    loss = held or [value for _, value in history.loss if value is not None]
    kind = "held-out loss" if held else "training loss"
    if loss:
        yield Tile(
            kind, f"{loss[-1]:.3f}", f"from {loss[0]:.3f}, nats per token" if len(loss) > 1 else "nats per token"
        )
    else:
        yield Tile(kind, "—", "not logged")


def _drift_tiles(made: RouterReport) -> Iterator[Tile]:
    history = made.history
    last = history.drift[-1].layers if history.drift else {}
    overlap = [(value, layer) for layer, value in enumerate(last.get("overlap", [])) if value is not None]
    top = "top-k" if history.base is None else f"top-{history.base.top_k}"
    if overlap:
        mean, (worst, layer) = sum(value for value, _ in overlap) / len(overlap), min(overlap)
        chance = "" if history.base is None else f", chance {chance_overlap(history.experts, history.base.top_k):.0%}"
        yield Tile(f"{top} overlap", f"{mean:.1%}", f"with the base; layer {layer} {worst:.1%}{chance}", mean)
    else:
        yield Tile(f"{top} overlap", "—", "not measured")
    change = [(value, layer) for layer, value in enumerate(last.get("load_change", [])) if value is not None]
    if change:
        value, layer = max(change)
        note = f"of an even share, layer {layer}"
        if history.base is not None and history.base.noise_floor > 0:
            note += f"; {value / history.base.noise_floor:.1f} times chance"
        yield Tile("load change", f"{value:.2f}", note, level="warning" if far(value, history) else "")
    else:
        yield Tile("load change", "—", "not measured")


def alarm_groups(alarms: Sequence[AlarmLine]) -> list[AlarmGroup]:
    """Alarms of one kind and place together, in the order in which they first went off."""
    together: dict[tuple[str, int, int | None], list[AlarmLine]] = {}
    for alarm in alarms:
        together.setdefault((alarm.alarm, alarm.layer, alarm.expert), []).append(alarm)
    return [
        AlarmGroup(
            group[0].step,
            group[-1].step,
            len(group),
            kind.replace("_", " "),
            visible(group[0].message),
            any(alarm.action == "stop" for alarm in group),
        )
        for (kind, _, _), group in together.items()
    ]


def repetition_rows(made: RouterReport) -> list[tuple[int, list[str]]]:
    """Layer, then the first expert's and any expert's repetition, base and end, in percent."""
    compared = made.comparison
    if compared is None:
        return []
    names = ("repeat_first", "repeat_any")
    if not any(name in window.layers for name in names for window in (compared.before, compared.after)):
        return []
    return [
        (
            layer,
            [
                shown(at(w.layers.get(name, []), layer), True)
                for name in names
                for w in (compared.before, compared.after)
            ],
        )
        for layer in range(made.history.layers)
    ]


def coloured(texts: Sequence[ColouredText], experts: int) -> list[ColouredLayer]:
    """Every shown layer with all texts, base and tuned."""
    found = []
    for index, layer in enumerate(texts[0].layers if texts else []):
        pairs = [(b, t) for text in texts for b, t in zip(text.base[index], text.tuned[index], strict=True)]
        sides = []
        for text in texts:
            rows = [row for row in zip(text.pieces, text.base[index], text.tuned[index], strict=True) if row[0]]
            sides.append(
                (
                    [_token(piece, b, f"expert {b}", experts, False) for piece, b, _ in rows],
                    [_token(piece, t, _title(b, t), experts, b != t) for piece, b, t in rows],
                )
            )
        found.append(ColouredLayer(layer, len(pairs), sum(b != t for b, t in pairs), sides))
    return [layer for layer in found if layer.tokens]


def _title(base: int, tuned: int) -> str:
    return f"expert {tuned}" if base == tuned else f"expert {tuned}, base {base}"


def versions(made: RouterReport) -> Iterator[tuple[str, str]]:
    """Commit, Python and packages, as the run wrote them down."""
    git = made.about.get("git")
    if isinstance(git, dict):
        yield "commit", visible(f"{git.get('commit')}" + (" with changes" if git.get("dirty") else ""))
    for name in ("python", "platform"):
        if made.about.get(name) is not None:
            yield name, visible(str(made.about[name]))
    packages: Any = made.about.get("packages")
    if isinstance(packages, dict):
        for name, version in packages.items():
            if version is not None:
                yield visible(str(name)), visible(str(version))


def _token(piece: str, expert: int, title: str, experts: int, changed: bool) -> Token:
    return Token(list(split_unseen(piece)), title, _style(expert, experts), _hue(expert, experts), changed)


def _style(expert: int, experts: int) -> str:
    """The class of an expert: one of eight colours, hatched for the next eight; a hue of its own among more."""
    if experts > 2 * _COLOURS:
        return "hue"
    return f"e{expert % _COLOURS}" + (" hatched" if expert >= _COLOURS else "")


def _hue(expert: int, experts: int) -> str:
    """Degrees; neighbours lie far apart (the golden angle)."""
    return f"{137.508 * expert % 360:.0f}" if experts > 2 * _COLOURS else ""
