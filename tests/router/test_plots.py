"""Figures: the numbers drawn are the numbers given, and no text is cut off."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.report.figures import LESS, MORE
from finetune.report.panels import thinned, together
from finetune.router import plots
from finetune.router.history import RouterHistory, Window, read_history
from finetune.router.plots import (
    drift_panels,
    layer_curves,
    load_heat_map,
    load_over_training,
    logged_metrics,
    mean_load,
    run_figures,
    training_panels,
)
from finetune.runfolder import RunFolder
from tests.router.study.runs import alarm, collapsing, drift, metrics_of, tilted, write_run

PNG = b"\x89PNG\r\n\x1a\n"


def history_of(folder: Path, **options: Any) -> RouterHistory:
    return read_history(RunFolder(write_run(folder, **options)))


def lines_of(axes: Axes) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}


def assert_nothing_is_clipped(figure: Figure) -> None:
    """Everything visible lies inside the page (inches)."""
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height


def even_but(layers: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(layers, experts, generator=generator, dtype=torch.float64) * 0.4, dim=1)


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (32, 8), (16, 64), (48, 128)])
def test_heat_map(layers: int, experts: int, tmp_path: Path) -> None:
    load = even_but(layers, experts)
    drawn = load_heat_map(load.tolist(), title="Expert load, training")
    assert drawn.save(tmp_path / "figures" / "load.png").read_bytes().startswith(PNG)
    assert_nothing_is_clipped(drawn.figure)
    values = [text.get_text() for text in drawn.figure.axes[0].texts]
    want = [f"{share * experts:.2f}" for row in load.tolist() for share in row]
    assert values == (want if experts <= 16 else [])
    assert [hint.text.rpartition(" ")[2] for hint in drawn.hints] == want


def test_heat_map_is_white_at_even_and_its_scale_does_not_depend_on_the_data() -> None:
    even, collapsed = torch.full((2, 8), 0.125), torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]] * 2)
    images = [load_heat_map(load.tolist()).figure.axes[0].images[0] for load in (even, collapsed)]
    assert [image.get_clim() for image in images] == [(0.0, 2.0)] * 2
    colours = [image.to_rgba(image.get_array()) for image in images]
    assert colours[0][..., 3].max() == 0  # nothing is drawn over the page
    busy, dead = colours[1][0, 0], colours[1][0, 7]
    assert busy.tolist() == pytest.approx([*(c / 255 for c in MORE), 1.0])
    assert dead.tolist() == pytest.approx([*(c / 255 for c in LESS), 1.0])


def test_training_curves(tmp_path: Path) -> None:
    history = history_of(tmp_path, layers=2, steps=(1, 2, 3), evaluations=(2,))
    history.loss[1] = (2, None)
    drawn = together([[panel] for panel in training_panels(history)], "A run")
    assert_nothing_is_clipped(drawn.figure)
    loss, imbalance, parts = drawn.figure.axes
    training = lines_of(loss)["training"]
    assert [training[0], training[2]] == [[1, 3.99], [3, 3.97]]
    assert math.isnan(training[1][1])
    assert lines_of(loss)["held-out"] == [[2, pytest.approx(4.18)]]
    worst = 0.2 * 1.02  # of the deeper layer
    lines = lines_of(imbalance)
    assert lines["worst layer, training"] == [[step, pytest.approx(worst)] for step in (1, 2, 3)]
    assert lines["mean of layers, training"] == [[step, pytest.approx((0.2 + worst) / 2)] for step in (1, 2, 3)]
    assert lines["worst layer, held-out"] == [[2, pytest.approx(worst)]]
    assert lines_of(parts) == {"completion": [[s, 0.3] for s in (1, 2, 3)], "prompt": [[s, 0.4] for s in (1, 2, 3)]}


def test_curves_of_a_run_without_router_metrics_or_without_any_log(tmp_path: Path) -> None:
    without = together([[panel] for panel in training_panels(history_of(tmp_path, router=False))], "A run").figure
    nothing = together([[panel] for panel in training_panels(RouterHistory())], "A run").figure
    assert [len(figure.axes) for figure in (without, nothing)] == [1, 1]
    assert nothing.axes[0].texts[0].get_text() == "nothing logged yet"
    for figure in (without, nothing):
        assert_nothing_is_clipped(figure)


def test_load_of_a_whole_run_weighs_windows_by_their_tokens() -> None:
    windows = [Window(1, 30, [[1.0, 0.0], [0.5, 0.5]], {}, {}), Window(2, 10, [[0.0, 1.0], [0.1, 0.9]], {}, {})]
    assert mean_load(windows, 0) == [0.75, 0.25]
    assert mean_load(windows, 1) == [pytest.approx(0.4), pytest.approx(0.6)]


@pytest.mark.parametrize(("layers", "experts", "across"), [(1, 4, 1), (6, 8, 6), (11, 128, 8)])
def test_load_over_training(layers: int, experts: int, across: int, tmp_path: Path) -> None:
    figure = load_over_training(history_of(tmp_path, layers=layers, experts=experts)).figure
    assert_nothing_is_clipped(figure)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == layers
    load = tilted(experts)
    for layer, axes in enumerate(panels):
        assert axes.get_title(loc="left") == f"layer {layer}"
        drawn, strip = axes.images
        assert drawn.get_clim() == strip.get_clim() == (0.0, 2.0)
        want = [[load(layer, step)[expert] * experts for step in range(10, 110, 10)] for expert in range(experts)]
        assert drawn.get_array().tolist() == [pytest.approx(row) for row in want]
        assert strip.get_array()[:, 0].tolist() == pytest.approx([share * experts for share in load(layer, 0)])
        assert axes.get_title(loc="right") == f"{max(load(layer, 100)) * experts:.2f}"
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == across


@pytest.mark.parametrize(("layers", "rows"), [(4, 5), (12, 1)])
def test_layer_curves_against_the_band(layers: int, rows: int, tmp_path: Path) -> None:
    load = collapsing(8, 2, 100)
    history = history_of(tmp_path, layers=layers, load=load, alarms=[alarm(60, 2, kind="dead_expert", expert=7)])
    names = logged_metrics(history)[:rows]
    drawn = layer_curves(history, names)
    assert_nothing_is_clipped(drawn.figure)
    panels = [axes for axes in drawn.figure.axes if axes.lines]
    assert len(panels) == layers * rows
    assert len({axes.get_ylim() for axes in panels[:layers]}) == 1
    for layer, axes in enumerate(panels[:layers]):
        lines = lines_of(axes)
        want = [[step, metrics_of(load(layer, step))["max_vio"]] for step in range(10, 110, 10)]
        assert lines["training"] == [pytest.approx(point) for point in want]
        assert [point[0] for point in lines["held-out"]] == [0, 50, 100]
        assert ("alarm" in lines) == (layer == 2)
        # 0.05 between windows of 1024 tokens, so half of it at 4096.
        base = metrics_of(load(layer, 0))["max_vio"]
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((base - 0.05, base + 0.05))


def test_curves_without_a_base(tmp_path: Path) -> None:
    figure = layer_curves(history_of(tmp_path, layers=2, steps=(2,), evaluations=(), base=False), ["max_vio"]).figure
    assert_nothing_is_clipped(figure)
    assert not any(axes.patches for axes in figure.axes)


def test_drift(tmp_path: Path) -> None:
    history = history_of(tmp_path, layers=4)
    rows = list(zip(*drift_panels(history), strict=True))
    figure = together(rows, "Drift").figure
    assert_nothing_is_clipped(figure)
    want = drift(4, 2.0)
    for axes, values in zip(figure.axes[:5], want.values(), strict=True):
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(values)
    mean, worst, chance = figure.axes[9].lines
    assert mean.get_xdata().tolist() == [0, 50, 100]
    assert mean.get_ydata()[-1] == pytest.approx(sum(want["router/drift/by_layer/load_change"]) / 4)
    assert worst.get_ydata()[-1] == pytest.approx(max(want["router/drift/by_layer/load_change"]))
    assert chance.get_ydata()[0] == 0.04
    assert figure.axes[5].lines[2].get_ydata()[0] == 0.25  # 2 of 8, by chance


def test_thinned_points_are_means() -> None:
    points = [(step, float(step)) for step in range(1, 8)]
    assert thinned(points, 7) == points
    assert thinned(points, 3) == [(3, 2.0), (6, 5.0), (7, 7.0)]
    assert thinned([(1, None), (2, 4.0), (3, None), (4, None)], 2) == [(2, 4.0), (4, None)]
    assert thinned([], 5) == []


def test_a_run_draws_what_it_has_numbers_for(tmp_path: Path) -> None:
    router = ["router_load.png", "router_load_over_training.png", "router_layers.png"]
    for name, options, want in (
        ("whole", {}, ["training.png", *router, "router_drift.png"]),
        ("no probe", {"base": False}, ["training.png", *router]),
        ("no router", {"router": False}, ["training.png"]),
    ):
        run = write_run(tmp_path / name, steps=(2, 4), evaluations=(0, 4), layers=2, **options)
        made = run_figures(RunFolder(run), tmp_path / name / "figures")
        assert [path.name for path in made] == want
        assert sorted(path.name for path in (tmp_path / name / "figures").iterdir()) == sorted(want)


def test_matplotlib_loads_only_with_the_figures() -> None:
    package = Path(plots.__file__).parent
    for source in (*package.glob("*.py"), package.parent / "jsonl.py", package.parent / "train" / "progress.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (node.module or "" if isinstance(node, ast.ImportFrom) else "", *(a.name for a in node.names))
        }
        reaches = {name for name in imported if name.split(".")[0] == "matplotlib" or name.endswith("plots")}
        assert (not reaches) or source.name == "plots.py", (source, reaches)
