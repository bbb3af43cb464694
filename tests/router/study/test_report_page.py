"""The page of a run, read back by an HTML parser: every number is there, texts are texts, and nothing else is."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from finetune.router.study.report import read_report
from finetune.router.study.report_page import render_report
from tests.data.check.reading import Node, read_page
from tests.router.study.runs import HARD, INJECTED, alarm, collapsing, metrics_of, tilted, write_run

TEXT = {"h1", "h2", "h3", "p", "b", "i", "small", "span", "bdi", "code", "dl", "dt", "dd", "ul", "ol", "li", "pre"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
DRAWING = {"figure", "svg", "g", "defs", "clippath", "circle", "path", "use", "rect", "text", "title", "image"}
FOLDED = {"details", "summary"}
HEAD = {"html", "head", "meta", "title", "link", "style"}
FRAME = {"body", "main", "header", "section", "div", "footer"}
TAGS = TEXT | TABLE | DRAWING | FOLDED | HEAD | FRAME

slow = pytest.mark.slow
RUNS: dict[str, dict[str, Any]] = {
    "healthy": {
        "alarms": [
            alarm(50, 3, kind="dead_expert", expert=2),
            alarm(70, 3, kind="dead_expert", expert=2),
            alarm(60, 4),
        ]
    },
    "collapsing": {
        "layers": 32,
        "load": collapsing(8, 17, 100),
        "alarms": [alarm(50, 17, kind="dead_expert", expert=7)],
    },
    "many experts": {
        "layers": 2,
        "experts": 128,
        "top_k": 8,
        "steps": tuple(range(10, 1010, 10)),
        "evaluations": (0, 1000),
    },
    "mixtral": {"layers": 32, "steps": tuple(range(10, 2010, 10)), "evaluations": (0, 1000, 2000)},
    "large": {
        "layers": 48,
        "experts": 128,
        "top_k": 8,
        "steps": tuple(range(10, 1010, 10)),
        "evaluations": (0, 500, 1000),
    },
    "bare": {"steps": (2, 4), "evaluations": (), "base": False, "layers": 2},
    "one log": {"steps": (2,), "evaluations": (), "base": False, "layers": 2},
}
SLOW = {"collapsing", "mixtral", "large"}
NAMES = [pytest.param(name, marks=slow) if name in SLOW else name for name in RUNS]


def page_of(folder: Path, **options: Any) -> str:
    return render_report(read_report(write_run(folder, **options)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The page of a run by its name, drawn once."""
    return cache(lambda name: page_of(tmp_path_factory.mktemp("run"), **RUNS[name]))


@pytest.fixture(scope="module", params=NAMES)
def page(request: pytest.FixtureRequest, pages: Callable[[str], str]) -> tuple[str, dict[str, Any], Node]:
    html = pages(request.param)
    return html, {"layers": 6, "experts": 8, **RUNS[request.param]}, read_page(html)


@pytest.fixture(scope="module")
def made(pages: Callable[[str], str]) -> Node:
    """The page of a small run, for tests of what every page has."""
    return read_page(pages("healthy"))


def hints(root: Node, pattern: str) -> list[re.Match[str]]:
    """What the places of a drawing say, where all of it fits."""
    return [match for node in root.all("title") if (match := re.fullmatch(pattern, node.text))]


def pixels(node: Node) -> np.ndarray:
    """RGBA from 0 to 1, [rows, columns, 4], top row first, of an image in a drawing."""
    kind, _, content = (node.attributes["xlink:href"] or "").partition(",")
    assert kind == "data:image/png;base64"
    read = image.imread(io.BytesIO(base64.b64decode(content)), format="png")
    turned = float((node.attributes["transform"] or "").removeprefix("matrix(").split()[3]) < 0
    return read[::-1] if turned else read


def test_only_our_own_elements(page: tuple[str, dict, Node]):
    html, _, root = page
    assert {node.tag for node in root.all()} <= TAGS
    for node in root.all():
        assert not [name for name in node.attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert (node.attributes.get(name) or "data:").startswith(("data:", "#"))
    style = next(iter(root.all("style"))).text
    assert "url(" not in style
    assert not re.search(r"url\((?!#)", html)  # clip paths of the drawings
    assert "@import" not in style
    assert "script-src" not in html
    assert "default-src 'none'" in html
    html.encode("utf-8")


def test_it_stays_small(page: tuple[str, dict, Node]):
    html, options, _ = page
    assert len(html.encode()) < (4_000_000 if options["layers"] == 48 else 2_000_000)


def section(root: Node, begins: str) -> Node:
    return next(
        node for node in root.all("section") if node.all("h2")[:1] and node.all("h2")[0].text.startswith(begins)
    )


def test_every_load_is_a_cell_that_says_its_value(page: tuple[str, dict, Node]):
    _, options, root = page
    layers, experts = options["layers"], options["experts"]
    drawn = section(root, "Load of the experts").all("svg")
    if len(options.get("steps", (1, 2))) < 2:
        assert drawn == []
        return
    load = options.get("load") or tilted(experts)
    before, after = (options["steps"][0], options["steps"][-1]) if options.get("base") is False else (0, 100)
    if "steps" in options and options.get("base", True):
        after = options["steps"][-1]
    cells = hints(drawn[0], r"layer (\d+), expert (\d+): ([-+.\d]+)")
    assert len(cells) == 3 * layers * experts
    pictures = drawn[0].all("image")
    for index in range(3):
        mine, shades = cells[index * layers * experts : (index + 1) * layers * experts], pixels(pictures[index])
        assert shades.shape[:2] == (layers, experts)
        for cell in mine[:: max(1, len(mine) // 50)]:
            layer, expert = int(cell[1]), int(cell[2])
            states = [load(layer, step)[expert] * experts for step in (before, after)]
            value = states[1] - states[0] if index == 2 else states[index]
            assert float(cell[3]) == pytest.approx(value, abs=0.0051)
            strength = abs(value) / 0.5 if index == 2 else abs(value - 1)
            assert shades[layer, expert, 3] == pytest.approx(min(strength, 1), abs=0.03)
    if experts <= 16:
        written = [node.text.replace("\u2212", "-") for node in drawn[0].all("text")]
        assert [text for text in written if re.fullmatch(r"[-+]?\d\.\d\d", text)] == [cell[3] for cell in cells]


def test_every_layer_over_training(page: tuple[str, dict, Node]):
    _, options, root = page
    layers, experts = options["layers"], options["experts"]
    steps = list(options.get("steps", range(10, 110, 10)))
    drawn = section(root, "Load over training")
    written = [node.text for node in drawn.all("text")]
    assert [text for text in written if text.startswith("layer ")] == [f"layer {layer}" for layer in range(layers)]
    load = options.get("load") or tilted(experts)
    with_strip = options.get("base", True)
    pictures = drawn.all("image")[:: 2 if with_strip else 1]
    columns = min(len(steps), -(-len(steps) // -(-len(steps) // 48)))
    ends = [text for text in written if re.fullmatch(r"\d\.\d\d", text)]
    for layer in {0, layers // 2, layers - 1}:
        shades = pixels(pictures[layer])
        assert shades.shape[:2] == (experts, columns)
        last = load(layer, steps[-1])
        assert float(ends[layer]) == pytest.approx(max(last) * experts, abs=0.0051)
        if len(steps) <= 48:
            assert shades[0, -1, 3] == pytest.approx(min(1, abs(last[0] * experts - 1)), abs=0.03)
    if layers * experts * columns <= 6_000:
        cells = hints(drawn, r"layer (\d+), expert (\d+), step (\d+): ([.\d]+)")
        assert len(cells) == layers * experts * columns
        for cell in cells[::7]:
            assert float(cell[4]) == pytest.approx(load(int(cell[1]), int(cell[3]))[int(cell[2])] * experts, abs=0.0051)
    else:
        assert len(hints(drawn, r"layer \d+, expert \d+: .*, between .*")) == layers * experts


def test_every_curve_with_its_band(page: tuple[str, dict, Node]):
    _, options, root = page
    layers = options["layers"]
    figures = root.all("section", kind="curves")[0].all("details")
    assert [figure.all("b")[0].text for figure in figures] == [
        "MaxVio", "Load entropy", "Token entropy", "z-loss", "Balance loss",
    ]  # fmt: skip
    for figure in figures:
        assert len(figure.all("g", kind="band")) == (layers if options.get("base", True) else 0)
        panels = [match[1] for match in hints(figure, r"layer (\d+).*")]
        assert panels == [str(layer) for layer in range(layers)]
        curves = figure.all("g", kind="train")
        assert sum(bool(curve.all("path")) for curve in curves) >= layers
        said = [rect for rect in figure.all("rect") if rect.attributes.get("role") == "img"]
        assert len(said) >= layers  # each is read aloud
    load = options.get("load") or tilted(options["experts"])
    steps = list(options.get("steps", range(10, 110, 10)))
    worst = max(range(layers), key=lambda at: metrics_of(load(at, steps[-1]))["max_vio"])
    assert f"layer {worst}" in figures[0].all("summary")[0].text
    want = f"layer 1: {9 + 0.01 * steps[0]:.3g} at step {steps[0]}, {9 + 0.01 * steps[-1]:.3g} at step {steps[-1]}"
    assert any(node.text.startswith(want) for node in figures[3].all("title"))


def test_alarms_are_listed_and_marked(made: Node):
    root = made
    rows = root.all("section", kind="alarms")[0].all("li")
    assert [row.all(kind="badge")[0].text for row in rows] == ["step 50", "step 60"]
    assert "layer 3: something happened & <b>more</b>" in rows[0].text
    assert "2 times, last at step 70" in rows[0].text
    for figure in root.all("section", kind="curves")[0].all("details"):
        assert [mark.text.partition(":")[0] for mark in figure.all("rect", kind="alarm")] == [
            "step 50",
            "step 70",
            "step 60",
        ]
        assert "step 60: layer 4: something happened & <b>more</b>" in [node.text for node in figure.all("title")]


def test_the_texts_are_the_texts(made: Node):
    root = made
    shown = {"\u202e": "\\u202e", "\x1b[31m": "\\x1b[31m"}
    hard = "".join(shown.get(piece, piece) for piece in HARD)
    boxes = root.all(kind="coloured")
    assert len(boxes) == 3 * 2 * 2  # layers, texts, sides
    assert [box.text for box in boxes[2:4]] == [hard, hard]
    assert INJECTED in boxes[2].text
    for index, layer in enumerate((0, 3, 5)):
        base, tuned = (box.all(kind="t") for box in boxes[4 * index + 2 : 4 * index + 4])
        assert [token.attributes["title"] for token in base] == [f"expert {(at + layer) % 8}" for at in range(9)]
        for at, token in enumerate(tuned):
            changed = at % 3 == 2
            expert = (at + layer + changed) % 8
            assert token.attributes["title"] == f"expert {expert}" + (f", base {(at + layer) % 8}" if changed else "")
            assert ("changed" in token.classes) == changed
            assert f"e{expert}" in token.classes
    said = [summary.text for summary in root.all("section", kind="texts")[0].all("summary")]
    assert said == [f"layer {layer} 4 of 13 tokens changed their first expert (30.8%)" for layer in (0, 3, 5)]


@pytest.mark.parametrize(("experts", "styles"), [(8, 8), (16, 16), (64, 64)])
def test_every_expert_has_a_look_of_its_own(tmp_path: Path, experts: int, styles: int):
    pieces = [f" {at}" for at in range(experts)]
    root = read_page(page_of(tmp_path, layers=1, steps=(2,), evaluations=(), experts=experts, texts=[pieces]))
    tokens = root.all(kind="coloured")[0].all(kind="t")
    assert len({(tuple(token.classes), token.attributes.get("style")) for token in tokens}) == styles
    assert len(root.all(kind="legend")) == (experts <= 16)


def test_repetition_beside_chance_and_the_paper(made: Node):
    root = made
    ours, paper = root.all("section", kind="repetition")[0].all("table")
    rows = [[cell.text for cell in row.all("td")] for row in ours.all("tbody")[0].all("tr")]
    assert rows[0] == ["0", "25.0", "25.0", "60.0", "60.0"]
    assert rows[-1] == ["random", "12.5", "12.5", "46.4", "46.4"]
    table = [[cell.text for cell in row.all("td")] for row in paper.all("tbody")[0].all("tr")]
    assert ["ArXiv", "14.0", "27.9", "22.7", "46.5", "62.3", "52.9"] in table
    assert ["GitHub", "14.9", "28.1", "19.7", "49.9", "66.9", "49.2"] in table
    assert len(table) == 9


def test_drift_by_layer_and_over_the_steps(made: Node):
    root = made
    figures = section(root, "Drift").all("figure")
    assert len(figures) == 10
    said = [node.text for node in figures[0].all("title")]
    assert said == [f"layer {layer}: {1 - 0.1 * (1 + layer / 6):.1%}" for layer in range(6)]
    heights = [float(rect.attributes["height"] or 0) for rect in figures[0].all("g", kind="hints")[0].all("rect")]
    want = [1 - 0.1 * (1 + layer / 6) for layer in range(6)]
    assert [height / heights[0] for height in heights] == pytest.approx([each / want[0] for each in want], abs=1e-3)


def test_a_run_without_alarms_warns_of_nothing(tmp_path: Path):
    for raised, level in (([], "notice"), ([alarm(50, 3)], "warning")):
        run = write_run(tmp_path, alarms=raised)
        lines = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(lines.replace('load_change": [0.12', 'load_change": [0.92'))
        root = read_page(render_report(read_report(run)))
        assert root.all("h1")[0].text == "Fine-tuning moved the routing"
        assert root.all("header")[0].classes == [level]
        assert any("warning" in tile.classes for tile in root.all(kind="tile")) == bool(raised)


def test_what_is_missing_is_said_with_its_key(tmp_path: Path):
    root = read_page(
        page_of(tmp_path, layers=2, steps=(2, 4), evaluations=(), base=False, recipe={"router": {"probe_tokens": 0}})
    )
    missing = root.all("section", kind="missing")[0].text
    assert "router.probe_tokens: 4096" in missing
    assert "training.eval_strategy: steps" in missing
    assert "Not measured in this run." in root.text
    assert not root.all("section", kind="texts")
    assert not root.all("section", kind="alarms")


def test_nothing_is_missing_in_a_whole_run(made: Node):
    assert not made.all("section", kind="missing")


def test_the_first_screen(tmp_path: Path):
    root = read_page(page_of(tmp_path, layers=2, load=collapsing(8, 1, 100), evaluations=(0, 100)))
    assert root.all("h1")[0].text == "Fine-tuning broke the routing"
    assert root.all("header")[0].classes == ["error"]
    todo = root.all(kind="todo")[0]
    assert todo.text.startswith(
        "What to do: do not use this adapter; train again with a tenth of training.learning_rate"
    )
    assert [code.text for code in todo.all("code")] == ["training.learning_rate"]
    tiles = {tile.all("h2")[0].text: tile for tile in root.all(kind="tile")}
    assert list(tiles) == ["worst MaxVio", "dead experts", "top-2 overlap", "load change", "alarms", "held-out loss"]
    assert tiles["worst MaxVio"].all(kind="value")[0].text == "1.00"
    assert tiles["worst MaxVio"].all(kind="note")[0].text == "layer 1; base 0.20, same tokens"
    assert tiles["dead experts"].all(kind="value")[0].text == "1"
    assert "error" in tiles["dead experts"].classes
    assert tiles["held-out loss"].all(kind="value")[0].text == "3.200"
    chips = {node.all("dt")[0].text: node.all("dd")[0].text for node in root.all(kind="settings")[0].all("div")}
    assert chips["model"] == "models/<b>some</b>"
    assert chips["routers"] == "2 layers of 8 experts, top 2"
    software = {row.all("th")[0].text: row.all("td")[0].text for row in root.all("section", kind="run")[0].all("tr")}
    assert software == {
        "commit": "abcdef0123456789 with changes",
        "python": "3.11.2",
        "platform": "Linux x86_64",
        "torch": "2.13.0",
    }
    assert root.all("pre")[0].text == "model:\n  path: models/<b>some</b>\n"
