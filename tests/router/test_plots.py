"""Figures: the numbers drawn are the numbers given, and no text is cut off."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from finetune.router import plots
from finetune.router.history import read_history
from finetune.router.plots import (
    drift_figure,
    layer_curves,
    load_heat_map,
    load_over_training,
    run_figures,
    run_load,
    training_curves,
)
from finetune.runfolder import RunFolder
from tests.router.study.runs import alarm, collapsing, drift, metrics_of, tilted, write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they are saved."""
    seen: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return seen


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


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 8), (32, 8), (16, 64), (48, 128)])
def test_heat_map(layers: int, experts: int, tmp_path: Path, figures: list[Figure]) -> None:
    load, path = even_but(layers, experts), tmp_path / "figures" / "load.png"
    load_heat_map(load, path, title="Expert load, training")
    assert path.read_bytes().startswith(PNG)
    assert [child.name for child in path.parent.iterdir()] == ["load.png"]
    (figure,) = figures
    assert_nothing_is_clipped(figure)
    values = [text.get_text() for text in figure.axes[0].texts]
    want = [f"{share * experts:.2f}" for row in load.tolist() for share in row]
    assert values == (want if experts <= 16 else [])


def test_heat_map_is_white_at_even_and_its_scale_does_not_depend_on_the_data(
    tmp_path: Path, figures: list[Figure]
) -> None:
    even, collapsed = torch.full((2, 8), 0.125), torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]] * 2)
    for load in (even, collapsed):
        load_heat_map(load, tmp_path / "load.png")
    images = [figure.axes[0].images[0] for figure in figures]
    assert [image.get_clim() for image in images] == [(0.0, 2.0)] * 2
    middle = images[0].to_rgba(images[0].get_array())[..., :3]
    assert middle.min() > 0.95
    busy, dead = images[1].to_rgba(images[1].get_array())[0, 0], images[1].to_rgba(images[1].get_array())[0, 7]
    assert tuple(busy) == colormaps["RdBu_r"](1.0)
    assert tuple(dead) == colormaps["RdBu_r"](0.0)


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_curves(tmp_path: Path, figures: list[Figure]) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": 3.0, "router/max_vio_worst": 0.5, "router/max_vio_mean": 0.25},
        {"step": 2, "loss": None, "router/max_vio_worst": 0.75, "router/max_vio_mean": 0.5},
        {"step": 2, "eval_loss": 2.5, "eval_router/max_vio_worst": 0.375},
        {"step": 3, "loss": 2.0, "router/max_vio_worst": 1.0, "router/max_vio_mean": 0.5},
        {"step": 3, "train_runtime": 1.0, "train_loss": 2.5},
    )
    training_curves(metrics, tmp_path / "curves.png", title="A run")
    (figure,) = figures
    assert_nothing_is_clipped(figure)
    loss, imbalance = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in (loss, imbalance) for line in axes.lines}
    assert drawn["training"][0] == [1, 3.0]
    assert math.isnan(drawn["training"][1][1])
    assert drawn["training"][2] == [3, 2.0]
    assert drawn["held-out"] == [[2, 2.5]]
    assert drawn["worst layer, training"] == [[1, 0.5], [2, 0.75], [3, 1.0]]
    assert drawn["mean of layers, training"] == [[1, 0.25], [2, 0.5], [3, 0.5]]
    assert drawn["worst layer, held-out"] == [[2, 0.375]]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_curves_of_a_run_without_router_metrics_or_without_any_log(tmp_path: Path, figures: list[Figure]) -> None:
    training_curves(write(tmp_path / "a.jsonl", {"step": 1, "loss": 3.0}), tmp_path / "a.png")
    training_curves(write(tmp_path / "b.jsonl", {"step": 1, "train_loss": 3.0}), tmp_path / "b.png")
    assert [len(figure.axes) for figure in figures] == [1, 1]
    assert figures[1].axes[0].texts[0].get_text() == "nothing logged yet"
    for figure in figures:
        assert_nothing_is_clipped(figure)


def test_load_of_a_whole_run_weighs_windows_by_their_tokens(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {
            "step": 1,
            "router/tokens": 30,
            "router/layer_00/load": [1.0, 0.0],
            "router/layer_01/load": [0.5, 0.5],
        },
        {"step": 1, "eval_router/tokens": 5, "eval_router/layer_00/load": [0.2, 0.8]},
        {
            "step": 2,
            "router/tokens": 10,
            "router/layer_00/load": [0.0, 1.0],
            "router/layer_01/load": [0.1, 0.9],
        },
        {"step": 2, "train_loss": 1.0},
    )
    assert run_load(metrics).tolist() == [[0.75, 0.25], [pytest.approx(0.4), pytest.approx(0.6)]]
    assert run_load(metrics, prefix="eval_").tolist() == [[0.2, 0.8]]
    assert run_load(write(tmp_path / "none.jsonl", {"step": 1, "loss": 1.0})) is None


@pytest.mark.parametrize(("layers", "experts", "across"), [(1, 4, 1), (6, 8, 6), (32, 8, 8), (48, 128, 8)])
def test_load_over_training(layers: int, experts: int, across: int, tmp_path: Path, figures: list[Figure]) -> None:
    history = read_history(RunFolder(write_run(tmp_path, layers=layers, experts=experts)))
    load_over_training(history.train, tmp_path / "load.png")
    (figure,) = figures
    assert_nothing_is_clipped(figure)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == layers
    load = tilted(experts)
    for layer, axes in enumerate(panels):
        assert axes.get_title() == f"layer {layer}"
        (drawn,) = axes.images
        assert drawn.get_clim() == (0.0, 2.0)
        want = [[load(layer, step)[expert] * experts for step in range(10, 110, 10)] for expert in range(experts)]
        assert drawn.get_array().tolist() == [pytest.approx(row) for row in want]
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == across


@pytest.mark.parametrize(("layers", "rows"), [(6, 5), (32, 1)])
def test_layer_curves_against_the_band(layers: int, rows: int, tmp_path: Path, figures: list[Figure]) -> None:
    load = collapsing(8, 2, 100)
    run = write_run(tmp_path, layers=layers, load=load, alarms=[alarm(60, 2, kind="dead_expert", expert=7)])
    layer_curves(read_history(RunFolder(run)), tmp_path / "layers.png")
    (figure,) = figures
    assert_nothing_is_clipped(figure)
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == layers * rows
    for layer, axes in enumerate(panels[:layers]):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        want = [[step, metrics_of(load(layer, step))["max_vio"]] for step in range(10, 110, 10)]
        assert drawn["training"] == [pytest.approx(point) for point in want]
        assert [point[0] for point in drawn["held-out"]] == [0, 50, 100]
        assert ("alarm" in drawn) == (layer == 2)
        # 0.05 between windows of 1024 tokens, so half of it at 4096.
        base = metrics_of(load(layer, 0))["max_vio"]
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((base - 0.05, base + 0.05))


def test_curves_without_a_base(tmp_path: Path, figures: list[Figure]) -> None:
    history = read_history(RunFolder(write_run(tmp_path, steps=(2,), evaluations=(), base=False)))
    layer_curves(history, tmp_path / "layers.png")
    assert_nothing_is_clipped(figures[0])
    assert not any(axes.patches for axes in figures[0].axes)


def test_drift_figure(tmp_path: Path, figures: list[Figure]) -> None:
    drift_figure(read_history(RunFolder(write_run(tmp_path, layers=4))), tmp_path / "drift.png")
    (figure,) = figures
    assert_nothing_is_clipped(figure)
    want = drift(4, 2.0)
    for axes, values in zip(figure.axes[:5], want.values(), strict=True):
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(values)
    mean, worst, chance = figure.axes[9].lines
    assert mean.get_xdata().tolist() == [0, 50, 100]
    assert mean.get_ydata()[-1] == pytest.approx(sum(want["router/drift/by_layer/load_change"]) / 4)
    assert worst.get_ydata()[-1] == pytest.approx(max(want["router/drift/by_layer/load_change"]))
    assert chance.get_ydata()[0] == 0.04


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
    for source in (*package.glob("*.py"), package.parent / "jsonl.py", package.parent / "progress.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (node.module or "" if isinstance(node, ast.ImportFrom) else "", *(a.name for a in node.names))
        }
        reaches = {name for name in imported if name.split(".")[0] == "matplotlib" or name.endswith("plots")}
        assert (not reaches) or source.name == "plots.py", (source, reaches)
