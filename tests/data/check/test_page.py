"""The page, read back by an HTML parser: every number and text is there, as text, and nothing else is."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import pytest

from finetune.data.check.page import render_page
from tests.data.check.reading import Node, read_page
from tests.data.check.samples import HARD_EXAMPLES, INJECTED, SOUND_EXAMPLES, example, faulty, piece, sound

PAGES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sound": (sound(), SOUND_EXAMPLES),
    "faulty": (faulty(), HARD_EXAMPLES),
}
# What the template writes; none of them runs or loads anything.
TEXT = {"h1", "h2", "h3", "p", "b", "i", "small", "span", "bdi", "code", "dl", "dt", "dd", "ul", "li"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
DRAWING = {"figure", "svg", "g", "defs", "clippath", "circle", "path", "use", "rect", "text"}
HEAD = {"html", "head", "meta", "title", "link", "style"}
FRAME = {"body", "main", "header", "section", "div", "article", "footer"}
TAGS = TEXT | TABLE | DRAWING | HEAD | FRAME


def escaped(text: str) -> str:
    """Unseen characters as Python writes them; only those of the samples."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\u202c\u202e\u200b\ufeff\ud800]", lambda char: repr(char[0])[1:-1], text)


def spaced(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest) -> tuple[Node, dict[str, Any], list[dict[str, Any]]]:
    document, examples = PAGES[request.param]
    return read_page(render_page(document, examples)), document, examples


def test_only_our_own_elements(page: tuple[Node, dict, list]):
    root, _, _ = page
    elements = root.all()
    assert {node.tag for node in elements} <= TAGS
    for node in elements:
        assert not [name for name in node.attributes if name.startswith("on")]
        for address in (node.attributes.get("href"), node.attributes.get("src")):
            assert address in (None, "data:,")
    style = next(iter(root.all("style"))).text
    assert "url(" not in style
    assert "@import" not in style


def test_examples_are_the_exact_text_with_the_exact_marks(page: tuple[Node, dict, list]):
    root, _, examples = page
    articles = root.all("article")
    assert len(articles) == len(examples)
    for article, row in zip(articles, examples, strict=True):
        runs = [(supervised, list(group)) for supervised, group in groupby(row["pieces"], lambda p: p["supervised"])]
        shown = article.all(kind="run")
        assert [
            ("learnt" if supervised else "prompt") in node.classes
            for (supervised, _), node in zip(runs, shown, strict=True)
        ]
        for (_, pieces), node in zip(runs, shown, strict=True):
            assert node.text == escaped("".join(each["text"] for each in pieces))
            assert [chip.text for chip in node.all(kind="chip")] == [p["text"] for p in pieces if p["control"]]
        assert escaped(row["where"]) in article.text
        assert f"{row['supervised']:,} learnt" in article.text


def test_the_counts_of_every_part(page: tuple[Node, dict, list]):
    root, document, _ = page
    text = spaced(root.text)
    sections = root.all("section", kind="part")
    for section, part in zip(sections, document["parts"], strict=True):
        said = spaced(section.text)
        for name in ("rows", "used", "examples", "tokens", "supervised_tokens", "turns", "turns_with_end"):
            assert f"{part[name]:,}" in said, name
        for source in part["sources"]:
            row = next(row for row in section.all("tr") if row.text.startswith(source["where"]))
            numbers = [td.text for td in row.all("td", kind="n")]
            weight = [] if source["weight"] is None else [str(source["weight"])]
            assert numbers == weight + [f"{source[name]:,}" for name in ("rows", "used", "refused")]
        for reason in part["refused"]:
            row = next(row for row in section.all("tr") if reason["reason"] in row.text)
            assert row.all("td")[0].text == f"{reason['rows']:,}"
            for where in reason["where"]:
                assert escaped(where).rpartition(" ")[2] in row.text
        grown = [float(i.attributes["style"].removeprefix("flex-grow:")) for i in section.all(kind="flow")[0].all("i")]
        assert sum(grown) == part["rows"]
        bars = [rect for hints in section.all("g", kind="hints") for rect in hints.all("rect")]
        assert len(bars) == sum(each["rows"] > 0 for each in part["lengths"]["histogram"])
    for fault in document["faults"]:
        assert spaced(escaped(fault["what"])) in text
        assert spaced(escaped(fault["fix"]).replace("`", "")) in text
    for name in ("recipe", "model", "template", "loss_on"):
        assert document[name] in text


def test_what_is_not_known_is_not_made_up():
    document = sound()
    document["leakage"] = None
    document["schedule"] |= {"tokens_per_second": None, "device": None, "hours": None, "cost": None}
    document["max_length"] = None
    document["parts"] = document["parts"][:1]
    root = read_page(render_page(document, []))
    text = spaced(root.text)
    assert "There are no held-out rows." in text
    assert "speed not measured" in text
    assert [node.text for node in root.all("dd")] == [document["model"], "mistral-v1", "all", "none", "on"]
    assert "cost" not in text
    assert not root.all("article")


def test_the_verdict_comes_first():
    for document, headline in ((sound(), "The data is fine"), (faulty(), "2 faults, 1 warning")):
        root = read_page(render_page(document, []))
        assert root.all("h1")[0].text == headline


def test_every_text_of_the_document_may_be_markup():
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return INJECTED if isinstance(value, str) and value not in ("train", "held-out", "error", "warning") else value

    html = render_page(poisoned(faulty()), [example([piece(INJECTED)], part=INJECTED, where=INJECTED)])
    assert {node.tag for node in read_page(html).all()} <= TAGS
    assert "49" not in spaced(read_page(html).all("header")[0].text)


def test_a_page_can_always_be_written_as_utf8():
    render_page(faulty(), HARD_EXAMPLES).encode("utf-8")
