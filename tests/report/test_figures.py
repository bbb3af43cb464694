"""A figure as a file, as pixels and inside a page, read back by other decoders."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image, rcParams
from matplotlib.figure import Figure

from finetune.report.figures import HEAT, LESS, MORE, SOFT, TRAIN, Drawn, Hint, styled
from tests.data.check.reading import Node, read_page


@styled
def a_figure(label: str = "a <b>label</b>") -> Drawn:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0.1234567, 1], color=TRAIN)[0].set_gid("train")
    axes.axhspan(0.2, 0.3, color=SOFT, alpha=0.17).set_gid("band")
    axes.set_title("3.14159 & $x^$ <script>")
    axes.set(xlim=(0, 4), ylim=(0, 2))
    hints = [
        Hint(axes, "a <i>place</i>", (1, 0.5, 2, 1.5), "alarm"),
        Hint(axes, "up", (1, -np.inf, 2, np.inf)),
        Hint(axes, "all"),
    ]
    return Drawn(figure, label, hints)


@pytest.fixture(scope="module")
def svg() -> tuple[str, Node]:
    text = str(a_figure().svg())
    return text, read_page(text)


def test_it_asks_nothing_and_is_the_same_each_time(svg: tuple[str, Node]):
    text, _ = svg
    before = dict(rcParams)
    assert str(a_figure().svg()) == text
    assert dict(rcParams) == before
    for word in ("http", "<!", "<?", "@import", "<style", "metadata", "font-family"):
        assert word not in text
    # Identifiers of two figures on one page are different ones.
    ids = [set(re.findall(r' id="([^"]+)"', str(drawn))) for drawn in (text, a_figure("another").svg())]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"#(\w+)\)", text)) <= ids[0]


def test_colours_are_the_pages_and_texts_are_texts(svg: tuple[str, Node]):
    text, root = svg
    assert not re.search(r"#[0-9a-f]{6}\b", text)
    assert "stroke: var(--train)" in text
    (drawn,) = root.all("svg")
    assert drawn.attributes["aria-label"] == "a <b>label</b>"
    assert drawn.attributes["role"] == "img"
    assert "3.14159 & $x^$ <script>" in [node.text for node in root.all("text")]  # not cut to two digits, as paths are
    assert [len(root.all("g", kind=kind)) for kind in ("train", "band")] == [1, 1]
    assert not re.search(r' d="[^"]*\.\d{3}', text)


def test_hints_lie_on_the_data(svg: tuple[str, Node]):
    _, root = svg
    place, up, whole = root.all("g", kind="hints")[0].all("rect")
    assert [node.text for node in (place, up, whole)] == ["a <i>place</i>", "up", "all"]
    assert place.classes == ["alarm"]
    x, y, width, height = (float(whole.attributes[name] or 0) for name in ("x", "y", "width", "height"))
    got = [float(place.attributes[name] or 0) for name in ("x", "y", "width", "height")]
    assert got == pytest.approx([x + width / 4, y + height / 4, width / 4, height / 2], abs=0.01)
    assert float(up.attributes["height"] or 0) == pytest.approx(height, abs=0.01)
    clip = root.all("clippath")[0].all("rect")[0]  # matplotlib's own idea of where the axes are
    assert [float(clip.attributes[name] or 0) for name in ("x", "y")] == pytest.approx([x, y], abs=0.011)


def test_a_file_is_the_picture(tmp_path: Path):
    path = a_figure().save(tmp_path / "new" / "figure.png")
    assert [child.name for child in path.parent.iterdir()] == ["figure.png"]
    read = image.imread(path)
    assert read.shape[:2] == (300, 450)
    assert np.array_equal((read[..., :3] * 255).round().astype(np.uint8), a_figure().pixels())


def test_an_even_load_has_no_colour():
    shades = HEAT(np.linspace(0, 1, 63))
    assert shades[31, 3] == 0
    for end, colour in ((0, LESS), (62, MORE)):
        assert shades[end] == pytest.approx([*(c / 255 for c in colour), 1])
    signed = np.where(np.arange(63) < 31, -1, 1) * shades[:, 3]
    assert signed == pytest.approx(np.linspace(-1, 1, 63))
