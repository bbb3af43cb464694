"""The palette: what can be read on what, and which colours are told apart, by formulas of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from finetune.report.figures import LESS, MORE
from finetune.report.look import PALETTE, TEXT, environment, expert_looks

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
def test_the_colours_of_experts_are_told_apart_by_all_eyes(theme: int):
    colours = [TEXT[f"e{expert}"][theme] for expert in range(8)]
    ink = TEXT["token"][theme]
    for colour in colours:
        dark, light = sorted((linear(colour) @ XYZ[1], linear(ink) @ XYZ[1]))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    for eye, matrix in EYES.items():
        seen = [lab(np.array(matrix) @ linear(colour)) for colour in colours]
        for one, other in itertools.combinations(range(8), 2):
            assert np.linalg.norm(seen[one] - seen[other]) > 17, (eye, one, other)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_numbers_can_be_read_on_the_strongest_colours_of_a_load(theme: int):
    """In the dark theme the colours are thinner (`--heat`), so that the page shows through."""
    opacity, ink = float(PALETTE["heat"][theme]), linear(PALETTE["ink"][theme]) @ XYZ[1]
    card = [int(PALETTE["card"][theme][at : at + 2], 16) for at in (1, 3, 5)]
    for strongest in (LESS, MORE):
        mixed = [round(opacity * c + (1 - opacity) * b) for c, b in zip(strongest, card, strict=True)]
        dark, light = sorted((linear("#" + bytes(mixed).hex()) @ XYZ[1], ink))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_every_expert_looks_different():
    for experts in (2, 8, 16, 17, 128):
        assert len({(look.style, look.hue) for look in expert_looks(experts)}) == experts


def test_templates_escape_and_miss_nothing(tmp_path: Path):
    (tmp_path / "a.jinja").write_text("{{ text }}|{{ twice(2) }}|{{ 1234 | number }}|{{ missing }}")

    def twice(x: int) -> int:
        return 2 * x

    with pytest.raises(UndefinedError, match="missing"):
        environment(tmp_path, twice).get_template("a.jinja").render(text="")
    (tmp_path / "b.jinja").write_text("{{ text }}|{{ twice(2) }}|{{ 1234 | number }}")
    assert environment(tmp_path, twice).get_template("b.jinja").render(text="<b>") == "&lt;b&gt;|4|1,234"
    assert environment(tmp_path, twice, escape=False).get_template("b.jinja").render(text="<b>") == "<b>|4|1,234"
