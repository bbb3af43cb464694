"""The curves of a run's routing, from its history to charts: what is drawn for which question.

Why small multiples: a mean over layers hides the one layer that collapses, so each layer has its own small chart, all
of a metric on one scale. How: training windows and held-out ones on their steps, the base's band behind them, alarms
as marks. Long runs are thinned by means of neighbouring logs; large models get fewer points.

Leaves out: coordinates (drawing.py), heat maps (report_heat.py), the first screen and the texts (report_page.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.router.drift import chance_overlap
from finetune.router.history import RouterHistory, Window, at, max_of
from finetune.router.metrics import random_repetition
from finetune.router.study.drawing import (
    Chart,
    Scale,
    Series,
    bars,
    chart,
    scale_of,
    step_scale,
    thinned,
)
from finetune.router.study.report import RouterReport

# What each curve is called, how it is read, and the edges that its scale has at least.
METRICS: dict[str, tuple[str, str, float | None, float | None]] = {
    "max_vio": ("MaxVio", "how far the busiest expert is above an even share; 0 is even", 0.0, None),
    "load_entropy": ("Load entropy", "how evenly the load is spread, 1 is even", None, 1.0),
    "token_entropy": ("Token entropy", "how undecided the router is about a token, nats", None, None),
    "z_loss": ("z-loss", "mean of logsumexp(logits)², grows with the size of the logits", None, None),
    "balance_loss": ("Balance loss", "E · Σ load · probability, 1 is even", None, 1.0),
}
DRIFT = {
    "overlap": ("Overlap", "share of the chosen experts that the base chose too"),
    "top1_agreement": ("Top-1 agreement", "share of tokens whose first expert is the base's"),
    "kl": ("KL", "from the base's router distribution to the tuned one, nats"),
    "js_load": ("Jensen-Shannon divergence of the load", "between the base's load and the tuned one, nats"),
    "load_change": ("Load change", "largest change of an expert's load, in even shares"),
}
# Points of a line; less where many layers have one each.
_POINTS, _POINTS_OF_MANY = 160, 60
_MANY_LAYERS = 16


@dataclass(frozen=True)
class Panel:
    """One layer of small multiples."""

    layer: int
    value: str
    chart: Chart
    title: str
    outside: bool


@dataclass(frozen=True)
class MetricFigure:
    name: str
    title: str
    about: str
    summary: str
    span: str
    panels: list[Panel]


@dataclass(frozen=True)
class Plot:
    """A labelled chart with the names of its lines."""

    title: str
    about: str
    chart: Chart
    key: list[tuple[str, str]]


def metric_figures(made: RouterReport) -> list[MetricFigure]:
    """The small multiples of each metric that was logged, all layers on one scale."""
    history = made.history
    found = []
    for name, (title, about, low, high) in METRICS.items():
        if any(name in window.layers for window in (*history.train, *history.held_out)):
            found.append(_metric_figure(made, name, title, about, low, high))
    return found


def overview(made: RouterReport) -> list[Plot]:
    """Loss, the worst layer's MaxVio, prompt and completion apart, and what an auxiliary loss added."""
    history = made.history
    x = _steps(made)
    marks = _marks(made)
    candidates: list[tuple[str, str, float | None, list[tuple[Series, str]]]] = [
        (
            "Loss",
            "nats per token",
            None,
            [
                (Series("train", history.loss), "training"),
                (Series("held", history.held_out_loss, dotted=True), "held-out"),
            ],
        ),
        (
            "MaxVio",
            "0 is even",
            0.0,
            [
                (_scalar("train", history.train, "max_vio_worst"), "worst layer, training"),
                (_scalar("mean", history.train, "max_vio_mean"), "mean of layers, training"),
                (_scalar("held", history.held_out, "max_vio_worst", dotted=True), "worst layer, held-out"),
            ],
        ),
        (
            "MaxVio of prompt and completion",
            "worst layer, training tokens",
            0.0,
            [
                (_scalar("train", history.train, "completion/max_vio_worst"), "completion"),
                (_scalar("prompt", history.train, "prompt/max_vio_worst"), "prompt"),
            ],
        ),
        (
            "Auxiliary loss",
            "what was added to the loss",
            0.0,
            [(_scalar("train", history.train, "aux/weighted"), "weighted balance and z-loss")],
        ),
    ]
    plots = []
    for title, about, low, lines in candidates:
        drawn = [(Series(s.kind, thinned(s.points, _POINTS), s.dotted), name) for s, name in lines if _known(s)]
        if not drawn:
            continue
        y = scale_of([value for s, _ in drawn for value in _known(s)], low=low)
        plots.append(
            Plot(title, about, chart([s for s, _ in drawn], x, y, marks=marks), [(s.kind, name) for s, name in drawn])
        )
    return plots


def drift_plots(made: RouterReport) -> list[tuple[Plot, Plot | None]]:
    """For each measure the last evaluation by layer, and mean and worst layer over the evaluations."""
    history = made.history
    points = history.drift
    if not points:
        return []
    found = []
    x = _steps(made)
    for name, (title, about) in DRIFT.items():
        values = points[-1].layers.get(name, [])
        if not any(value is not None for value in values):
            continue
        share = name in ("overlap", "top1_agreement")
        rules = _drift_rules(history, name)
        over = [[value for value in point.layers.get(name, []) if value is not None] for point in points]
        largest = max((value for each in over for value in each), default=0.0)
        # A rule far above all values would flatten them.
        y = (
            Scale(0.0, 1.0, 0.25)
            if share
            else scale_of([largest, *(at for at, _, _ in rules if at < 4 * largest)], low=0.0)
        )
        rules = [rule for rule in rules if rule[0] <= y.high]
        titles = [f"layer {layer}: {shown(value, share)}" for layer, value in enumerate(values)]
        layers = Plot(title, about, bars(values, titles, y, rules), [(kind, label) for _, kind, label in rules])
        worst = min if share else max
        lines = [
            Series("train", [(p.step, sum(v) / len(v)) for p, v in zip(points, over, strict=True) if v], dotted=True),
            Series("held", [(p.step, worst(v)) for p, v in zip(points, over, strict=True) if v], dotted=True),
        ]
        steps = Plot(
            title,
            "over the steps",
            chart(lines, x, y, rules=rules),
            [("train", "mean of layers"), ("held", "worst layer")],
        )
        found.append((layers, steps if len(points) > 1 else None))
    return found


def repetition_plots(made: RouterReport) -> list[Plot]:
    """The same first expert, and any in common, for neighbouring tokens: base and end by layer, beside chance."""
    compared, base = made.comparison, made.history.base
    if compared is None:
        return []
    plots = []
    depth = made.history.layers - 1
    x = Scale(0, max(depth, 1), 1)
    random = None if base is None else random_repetition(made.history.experts, base.top_k)
    for index, (name, title) in enumerate(
        (("repeat_first", "Same first expert"), ("repeat_any", "An expert in common"))
    ):
        lines = [
            Series(kind, list(enumerate(window.layers.get(name, []))), dotted=made.history.layers <= _MANY_LAYERS)
            for kind, window in (("base", compared.before), ("train", compared.after))
        ]
        if not any(_known(line) for line in lines):
            continue
        rules = [] if random is None else [(random[index], "chance", "random routing")]
        y = scale_of([*(v for line in lines for v in _known(line)), *(at for at, _, _ in rules)], low=0.0)
        drawn = chart(lines, x, y, rules=rules)
        ticks = bars([0.0] * made.history.layers, [""] * made.history.layers, y, ())
        shift = [tick.__class__(x.at(int(tick.label)), tick.label) for tick in ticks.x_ticks]
        key = [
            ("base", compared.before_name),
            ("train", compared.after_name),
            *((kind, label) for _, kind, label in rules),
        ]
        plots.append(
            Plot(
                title,
                "share of neighbouring tokens, by layer",
                Chart(drawn.lines, rules=drawn.rules, y_ticks=drawn.y_ticks, x_ticks=shift),
                key,
            )
        )
    return plots


def shown(value: float | None, share: bool) -> str:
    if value is None:
        return "—"
    return f"{value:.1%}" if share else f"{value:.3g}"


def _metric_figure(
    made: RouterReport, name: str, title: str, about: str, low: float | None, high: float | None
) -> MetricFigure:
    history = made.history
    most = _POINTS if history.layers <= _MANY_LAYERS else _POINTS_OF_MANY
    lines = []
    for layer in range(history.layers):
        points = [(window.step, at(window.layers.get(name, []), layer)) for window in history.train]
        others = [(window.step, at(window.layers.get(name, []), layer)) for window in history.held_out]
        band = None if history.base is None else history.base.band(name, layer, history.window_tokens)
        lines.append((Series("train", thinned(points, most)), Series("held", others, dotted=True), band))
    values = [v for train, held, band in lines for v in (*_known(train), *_known(held), *(band or ()))]
    y = scale_of(values, low=low, high=high)
    if name == "load_entropy":
        y = Scale(y.low, 1.0, y.step)
    x = _steps(made)
    panels = []
    for layer, (train, held, band) in enumerate(lines):
        marks = [
            (alarm.step, f"step {alarm.step}: {alarm.message}") for alarm in history.alarms if alarm.layer == layer
        ]
        base = None if history.base is None else at(history.base.window.layers.get(name, []), layer)
        rules = [] if base is None else [(base, "base", "")]
        logged = ((window.step, at(window.layers.get(name, []), layer)) for window in history.train)
        known = [(step, value) for step, value in logged if value is not None]
        last = known[-1][1] if known else None
        text = f"layer {layer}"
        if known:
            text += f": {known[0][1]:.3g} at step {known[0][0]:g}, {known[-1][1]:.3g} at step {known[-1][0]:g}"
        if base is not None:
            text += f"; base {base:.3g}" + ("" if band is None else f", band {band[0]:.3g} to {band[1]:.3g}")
        outside = band is not None and last is not None and not band[0] <= last <= band[1]
        drawn = chart([train, held], x, y, band=band, rules=rules, marks=marks, labelled=False)
        panels.append(Panel(layer, "—" if last is None else f"{last:.{_digits(name)}f}", drawn, text, outside))
    return MetricFigure(name, title, about, _summary(history, name, panels), f"{y.low:g} to {y.high:g}", panels)


def _summary(history: RouterHistory, name: str, panels: Sequence[Panel]) -> str:
    """The worst layer at the end, and how many left the band."""
    low_is_worse = name.endswith("entropy")
    last = history.train[-1].layers.get(name, []) if history.train else history.held_out[-1].layers.get(name, [])
    sign = -1 if low_is_worse else 1
    worst = max_of([None if value is None else sign * value for value in last])
    if worst is None:
        return ""
    digits = _digits(name)
    text = f"{'lowest' if low_is_worse else 'highest'} {sign * worst[1]:.{digits}f} in layer {worst[0]}"
    base = None if history.base is None else at(history.base.window.layers.get(name, []), worst[0])
    if base is None:
        return text
    outside = sum(panel.outside for panel in panels)
    return f"{text}, {base:.{digits}f} there in the base; {outside} of {len(panels)} layers end outside the band"


def _digits(name: str) -> int:
    """Decimals that tell one layer from another: load entropies lie just below 1."""
    return 3 if name == "load_entropy" else 2


def _drift_rules(history: RouterHistory, name: str) -> list[tuple[float, str, str]]:
    if history.base is None:
        return []
    if name == "overlap":
        return [(chance_overlap(history.experts, history.base.top_k), "chance", "random routing")]
    if name == "top1_agreement":
        return [(1 / history.experts, "chance", "random routing")]
    if name == "load_change":
        return [(history.base.noise_floor, "chance", "what chance shows")]
    return []


def _marks(made: RouterReport) -> list[tuple[int, str]]:
    return sorted({(alarm.step, f"step {alarm.step}: alarm") for alarm in made.history.alarms})


def _steps(made: RouterReport) -> Scale:
    steps = [step for step, _ in made.steps]
    return step_scale(min(steps), max(steps))


def _scalar(kind: str, windows: Sequence[Window], name: str, *, dotted: bool = False) -> Series:
    return Series(kind, [(w.step, w.scalars.get(name)) for w in windows], dotted)


def _known(series: Series) -> list[float]:
    return [value for _, value in series.points if value is not None]
