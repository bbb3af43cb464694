"""A run's routing as one page: the verdict first, then the load, the curves, the drift, repetition and coloured text.

Words are laid out here, figures are drawn in router/plots.py, the looks are in `report.html.jinja`, `report.css.jinja`
and the templates of `finetune.report`. The page asks nothing of the network. Colour never stands alone: values and
experts are in the titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import counts, split_unseen, visible
from finetune.report import Drawn, ExpertLook, Tile, environment, expert_looks, together
from finetune.router.drift import chance_overlap
from finetune.router.history import AlarmLine, ColouredText, RouterHistory, at
from finetune.router.metrics import random_repetition
from finetune.router.plots import (
    METRICS,
    curves_of,
    digits,
    drift_panels,
    layer_curves,
    load_maps,
    load_over_training,
    logged_metrics,
    repetition_panels,
    training_panels,
)
from finetune.router.study.analyze import PAPER
from finetune.router.study.report import RouterReport
from finetune.router.study.verdict import far, setting, value_of

_ALARMS = 40
_OPEN_LAYERS = 8  # with so few layers all curves are open


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
    """A piece of text with its first expert."""

    stretches: list[tuple[str, bool]]
    title: str
    look: ExpertLook
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
    history, compared = made.history, made.comparison
    base, experts = history.base, history.experts
    names = None if compared is None else (compared.before_name, compared.after_name)
    repetition = []
    if compared is not None and names is not None:
        repetition = repetition_panels(history, compared.before, compared.after, names)
    drift = drift_panels(history) if history.drift else []
    several = len(history.drift) > 1
    return (
        environment(Path(__file__).parent, counts, visible)
        .get_template("report.html.jinja")
        .render(
            made=made,
            name=visible(made.name),
            chips=list(chips(made)),
            tiles=list(tiles(made)),
            alarms=alarm_groups(history.alarms),
            alarms_shown=_ALARMS,
            maps=None if compared is None or names is None else load_maps(compared.before, compared.after, names),
            over_training=load_over_training(history) if history.train else None,
            logs=[window.step for window in history.train],
            metrics=[metric_figure(history, name) for name in logged_metrics(history)],
            all_open=history.layers <= _OPEN_LAYERS,
            overview=[together([[panel]], "The run over its steps") for panel in training_panels(history)],
            drift=[
                together([[panel]], "Drift from the base")
                for pair in drift
                for panel in (pair if several else pair[:1])
            ],
            repetition=[together([[panel]], "Repetition by layer") for panel in repetition],
            repetition_rows=repetition_rows(made),
            random=None if base is None else random_repetition(experts, base.top_k),
            paper=PAPER,
            texts=coloured(history.texts, experts),
            legend=expert_looks(experts) if experts <= 16 else [],
            versions=list(versions(made)),
            recipe=made.recipe_text,
        )
    )


def metric_figure(history: RouterHistory, name: str) -> tuple[str, str, str, Drawn]:
    """Title, how the metric is read, how it stands at the end, and the figure."""
    title, about, _, _ = METRICS[name]
    curves = curves_of(history, name)
    last = history.train[-1].layers.get(name, []) if history.train else history.held_out[-1].layers.get(name, [])
    known = [(value, layer) for layer, value in enumerate(last) if value is not None]
    summary = about
    if known:
        low_is_worse = name.endswith("entropy")
        value, layer = min(known) if low_is_worse else max(known, key=lambda each: (each[0], -each[1]))
        summary = f"{'lowest' if low_is_worse else 'highest'} {value:.{digits(name)}f} in layer {layer}"
        base = curves[layer].base
        if base is not None:
            outside = sum(curve.outside for curve in curves)
            summary += (
                f", {base:.{digits(name)}f} there in the base; {outside} of {len(curves)} layers end outside the band"
            )
    return title, about[:1].upper() + about[1:], summary, layer_curves(history, [name])


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
        yield Tile(
            "load change", f"{value:.2f}", note, level="warning" if history.alarms and far(value, history) else ""
        )
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
            [_percent(at(w.layers.get(name, []), layer)) for name in names for w in (compared.before, compared.after)],
        )
        for layer in range(made.history.layers)
    ]


def coloured(texts: Sequence[ColouredText], experts: int) -> list[ColouredLayer]:
    """Every shown layer with all texts, base and tuned."""
    looks, found = expert_looks(experts), []
    for index, layer in enumerate(texts[0].layers if texts else []):
        pairs = [pair for text in texts for pair in zip(text.base[index], text.tuned[index], strict=True)]
        sides = []
        for text in texts:
            base, tuned = [], []
            for piece, b, t in zip(text.pieces, text.base[index], text.tuned[index], strict=True):
                if piece:
                    stretches = list(split_unseen(piece))
                    title = f"expert {t}" if b == t else f"expert {t}, base {b}"
                    base.append(Token(stretches, f"expert {b}", looks[b], False))
                    tuned.append(Token(stretches, title, looks[t], b != t))
            sides.append((base, tuned))
        found.append(ColouredLayer(layer, len(pairs), sum(b != t for b, t in pairs), sides))
    return [layer for layer in found if layer.tokens]


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


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"
