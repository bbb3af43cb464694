"""The page of a run, read back by an HTML parser: every number is there, texts are texts, and nothing else is."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.router.study.report import read_report
from finetune.router.study.report_page import render_report
from tests.data.check.reading import Node, read_page
from tests.router.study.runs import HARD, INJECTED, alarm, collapsing, metrics_of, tilted, write_run
from tests.router.study.test_drawing import pixels

TEXT = {"h1", "h2", "h3", "p", "b", "i", "small", "span", "bdi", "code", "dl", "dt", "dd", "ul", "ol", "li", "pre"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
DRAWING = {"figure", "figcaption", "svg", "circle", "path", "line", "rect", "title", "img", "details", "summary"}
HEAD = {"html", "head", "meta", "title", "link", "style"}
FRAME = {"body", "main", "header", "section", "div", "footer"}
TAGS = TEXT | TABLE | DRAWING | HEAD | FRAME

RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapsing": {
        "layers": 32,
        "load": collapsing(8, 17, 100),
        "alarms": [alarm(50, 17, kind="dead_expert", expert=7)],
    },
    "sixteen": {"layers": 4, "experts": 16},
    "large": {
        "layers": 48,
        "experts": 128,
        "top_k": 8,
        "steps": tuple(range(10, 1010, 10)),
        "evaluations": (0, 500, 1000),
    },
    "bare": {"steps": (2, 4), "evaluations": (), "base": False},
    "one log": {"steps": (2,), "evaluations": (), "base": False},
}


def page_of(folder: Path, **options: Any) -> str:
    return render_report(read_report(write_run(folder, **options)))


@pytest.fixture(scope="module", params=RUNS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Node]:
    html = page_of(tmp_path_factory.mktemp("run"), **RUNS[request.param])
    return html, {"layers": 6, "experts": 8, **RUNS[request.param]}, read_page(html)


def titles(root: Node, pattern: str) -> list[re.Match[str]]:
    found = [re.fullmatch(pattern, node.attributes["title"] or "") for node in root.all() if "title" in node.attributes]
    return [match for match in found if match]


def test_only_our_own_elements(page: tuple[str, dict, Node]):
    html, _, root = page
    assert {node.tag for node in root.all()} <= TAGS
    for node in root.all():
        assert not [name for name in node.attributes if name.startswith("on")]
        for name in ("href", "src"):
            assert (node.attributes.get(name) or "data:").startswith("data:")
    style = next(iter(root.all("style"))).text
    assert "url(" not in style
    assert "@import" not in style
    assert "script-src" not in html
    assert "default-src 'none'" in html
    html.encode("utf-8")


def test_it_stays_small(page: tuple[str, dict, Node]):
    html, options, _ = page
    assert len(html.encode()) < (4_000_000 if options["layers"] == 48 else 1_000_000)


def test_every_load_is_a_cell_that_says_its_value(page: tuple[str, dict, Node]):
    _, options, root = page
    layers, experts = options["layers"], options["experts"]
    maps = [node for node in root.all("figure") if "heat" in node.classes]
    if len(options.get("steps", (1, 2))) < 2:
        assert maps == []
        return
    assert len(maps) == 3
    load = options.get("load") or tilted(experts)
    before, after = (options["steps"][0], options["steps"][-1]) if options.get("base") is False else (0, 100)
    if "steps" in options and options.get("base", True):
        after = options["steps"][-1]
    for index, node in enumerate(maps):
        cells = titles(node, r"layer (\d+), expert (\d+): ([-+.\d]+)")
        assert len(cells) == layers * experts
        shades = pixels(node.all("img")[0].attributes["src"] or "")
        assert shades.shape[:2] == (layers, experts)
        for cell in cells[:: max(1, len(cells) // 50)]:
            layer, expert = int(cell[1]), int(cell[2])
            states = [load(layer, step)[expert] * experts for step in (before, after)]
            value = states[1] - states[0] if index == 2 else states[index]
            assert float(cell[3]) == pytest.approx(value, abs=0.0051)
            strength = abs(value) / 0.5 if index == 2 else abs(value - 1)
            assert shades[layer, expert, 3] == pytest.approx(min(strength, 1), abs=0.03)
        if experts == 8:
            assert [cell.text for cell in node.all("b") if "title" in cell.attributes] == [cell[3] for cell in cells]


def test_every_layer_over_training(page: tuple[str, dict, Node]):
    _, options, root = page
    layers, experts = options["layers"], options["experts"]
    steps = list(options.get("steps", range(10, 110, 10)))
    panels = [node for node in root.all("figure") if node.all(kind="pair")]
    assert [panel.all("span")[0].text for panel in panels] == [f"layer {layer}" for layer in range(layers)]
    load = options.get("load") or tilted(experts)
    for layer in {0, layers // 2, layers - 1}:
        image = pixels(panels[layer].all("img")[-1].attributes["src"] or "")
        columns = min(len(steps), -(-len(steps) // -(-len(steps) // 48)))
        assert image.shape[:2] == (experts, columns)
        last = load(layer, steps[-1])
        if len(steps) <= 48:
            assert image[0, -1, 3] == pytest.approx(min(1, abs(last[0] * experts - 1)), abs=0.03)
            for match in titles(panels[layer], r"layer (\d+), expert (\d+), step (\d+): ([.\d]+)"):
                value = load(int(match[1]), int(match[3]))[int(match[2])] * experts
                assert float(match[4]) == pytest.approx(value, abs=0.0051)
        assert float(panels[layer].all(kind="end")[0].text) == pytest.approx(max(last) * experts, abs=0.0051)
        said = [b for b in panels[layer].all("b") if "title" in b.attributes]
        assert len(said) == (experts if layers * experts * columns > 12_000 else experts * columns)


def test_every_curve_with_its_band(page: tuple[str, dict, Node]):
    _, options, root = page
    curves = root.all("section", kind="curves")[0]
    figures = curves.all("details")
    assert [figure.all("b")[0].text for figure in figures] == [
        "MaxVio", "Load entropy", "Token entropy", "z-loss", "Balance loss",
    ]  # fmt: skip
    for figure in figures:
        panels = figure.all("figure")
        assert len(panels) == options["layers"]
        for panel in panels:
            assert len([path for path in panel.all("path") if "band" in path.classes]) == (
                options.get("base", True) is True
            )
            assert [path for path in panel.all("path") if "line" in path.classes and "train" in path.classes]
    load = options.get("load") or tilted(options["experts"])
    steps = list(options.get("steps", range(10, 110, 10)))
    worst = max(range(options["layers"]), key=lambda at: metrics_of(load(at, steps[-1]))["max_vio"])
    assert f"layer {worst}" in figures[0].all("summary")[0].text
    said = figures[3].all("figure")[1].all("title")[0].text
    want = f"layer 1: {9 + 0.01 * steps[0]:.3g} at step {steps[0]}, {9 + 0.01 * steps[-1]:.3g} at step {steps[-1]}"
    assert said.startswith(want)


def test_alarms_are_listed_and_marked(tmp_path: Path):
    alarms = [alarm(50, 3, kind="dead_expert", expert=2), alarm(70, 3, kind="dead_expert", expert=2), alarm(60, 4)]
    root = read_page(page_of(tmp_path, alarms=alarms))
    rows = root.all("section", kind="alarms")[0].all("li")
    assert [row.all(kind="badge")[0].text for row in rows] == ["step 50", "step 60"]
    assert "layer 3: something happened & <b>more</b>" in rows[0].text
    assert "2 times, last at step 70" in rows[0].text
    marked = [
        [len([line for line in panel.all("line") if "alarm" in line.classes]) for panel in figure.all("figure")]
        for figure in root.all("section", kind="curves")[0].all("details")
    ]
    assert marked == [[0, 0, 0, 2, 1, 0]] * 5
    assert not read_page(page_of(tmp_path / "quiet")).all("section", kind="alarms")


def test_the_texts_are_the_texts(tmp_path: Path):
    root = read_page(page_of(tmp_path))
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
    root = read_page(page_of(tmp_path, experts=experts, texts=[pieces]))
    tokens = root.all(kind="coloured")[0].all(kind="t")
    assert len({(tuple(token.classes), token.attributes.get("style")) for token in tokens}) == styles
    assert len(root.all(kind="legend")) == (experts <= 16)


def test_repetition_beside_chance_and_the_paper(tmp_path: Path):
    root = read_page(page_of(tmp_path))
    section = root.all("section", kind="repetition")[0]
    ours, paper = section.all("table")
    rows = [[cell.text for cell in row.all("td")] for row in ours.all("tbody")[0].all("tr")]
    assert rows[0] == ["0", "25.0", "25.0", "60.0", "60.0"]
    assert rows[-1] == ["random", "12.5", "12.5", "46.4", "46.4"]
    table = [[cell.text for cell in row.all("td")] for row in paper.all("tbody")[0].all("tr")]
    assert ["ArXiv", "14.0", "27.9", "22.7", "46.5", "62.3", "52.9"] in table
    assert ["GitHub", "14.9", "28.1", "19.7", "49.9", "66.9", "49.2"] in table
    assert len(table) == 9


def test_drift_by_layer_and_over_the_steps(tmp_path: Path):
    root = read_page(page_of(tmp_path))
    section = next(node for node in root.all("section") if node.all("h2")[0].text.startswith("Drift"))
    figures = section.all("figure")
    assert len(figures) == 10
    said = [node.text for node in figures[0].all("title")]
    assert said == [f"layer {layer}: {1 - 0.1 * (1 + layer / 6):.1%}" for layer in range(6)]
    heights = [float(rect.attributes["height"] or 0) for rect in figures[0].all("rect")]
    assert heights == pytest.approx([100 * (1 - 0.1 * (1 + layer / 6)) for layer in range(6)], abs=0.006)


def test_what_is_missing_is_said_with_its_key(tmp_path: Path):
    root = read_page(
        page_of(tmp_path, steps=(2, 4), evaluations=(), base=False, recipe={"router": {"probe_tokens": 0}})
    )
    missing = root.all("section", kind="missing")[0].text
    assert "router.probe_tokens: 4096" in missing
    assert "training.eval_strategy: steps" in missing
    assert "Not measured in this run." in root.text
    assert not root.all("section", kind="texts")
    assert not read_page(page_of(tmp_path / "whole")).all("section", kind="missing")


def test_the_first_screen(tmp_path: Path):
    root = read_page(page_of(tmp_path, layers=32, load=collapsing(8, 17, 100)))
    assert root.all("h1")[0].text == "Fine-tuning broke the routing"
    tiles = {tile.all("h2")[0].text: tile for tile in root.all(kind="tile")}
    assert list(tiles) == ["worst MaxVio", "dead experts", "top-2 overlap", "load change", "alarms", "held-out loss"]
    assert tiles["worst MaxVio"].all(kind="value")[0].text == "1.00"
    assert tiles["worst MaxVio"].all(kind="note")[0].text == "layer 17; base 0.32, same tokens"
    assert tiles["dead experts"].all(kind="value")[0].text == "1"
    assert "error" in tiles["dead experts"].classes
    assert tiles["held-out loss"].all(kind="value")[0].text == "3.200"
    chips = {node.all("dt")[0].text: node.all("dd")[0].text for node in root.all(kind="settings")[0].all("div")}
    assert chips["model"] == "models/<b>some</b>"
    assert chips["routers"] == "32 layers of 8 experts, top 2"
    software = {row.all("th")[0].text: row.all("td")[0].text for row in root.all("section", kind="run")[0].all("tr")}
    assert software == {
        "commit": "abcdef0123456789 with changes",
        "python": "3.11.2",
        "platform": "Linux x86_64",
        "torch": "2.13.0",
    }
    assert root.all("pre")[0].text == "model:\n  path: models/<b>some</b>\n"


# Machado, Oliveira and Fernandes 2009, complete dichromacy, linear RGB; and eyes that see all.
EYES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    scaled = XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    root = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_colours_of_experts_are_told_apart_by_all_eyes(tmp_path: Path, theme: int):
    style = next(iter(read_page(page_of(tmp_path)).all("style"))).text
    colours = [re.findall(rf"--e{expert}: (#\w{{6}})", style)[theme] for expert in range(8)]
    ink = re.findall(r"--token: (#\w{6})", style)[theme]
    for colour in colours:
        dark, light = sorted((linear(colour) @ XYZ[1], linear(ink) @ XYZ[1]))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    for eye, matrix in EYES.items():
        seen = [lab(np.array(matrix) @ linear(colour)) for colour in colours]
        for one, other in itertools.combinations(range(8), 2):
            assert np.linalg.norm(seen[one] - seen[other]) > 17, (eye, one, other)
