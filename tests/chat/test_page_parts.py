"""What the page is made of, without a browser: two answers at once, and text that stays text."""

from __future__ import annotations

import threading
from html.parser import HTMLParser
from typing import Any

import pytest

from finetune.chat.answering import Answering
from finetune.chat.parts import chat_text, coloured_text, head, legend, refusal, style_sheet
from finetune.chat.routes import Routed
from finetune.chat.sides import Turn, history, requests_for, summary
from finetune.errors import DataError, EngineError
from finetune.infer.request import Sampling
from finetune.report import expert_looks
from tests.chat.fake import FakeEngine

INJECTED = "<script>alert(1)</script><img src=x onerror=alert(2)> &lt; ${alert(3)} {{value}} \x1b[2J \u202e"
SHOWN = INJECTED.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


class Seen(HTMLParser):
    """The tags of a document, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_both_sides_answer_at_once_and_go_on_from_their_own_answers() -> None:
    engine: Any = FakeEngine(delay=0.01)
    asked = requests_for(engine, [], "one two", ["tuned", "base"], Sampling(seed=4), None)
    states = [[side.text for side in sides] for sides in Answering(engine, asked).states()]
    assert states[-1] == ["tuned: one two", "base: one two"]
    turns = [Turn("one two", tuple(states[-1]))]
    [left, right] = requests_for(engine, turns, "three", ["tuned", "base"], Sampling(), "Be brief.")
    words = [" ".join(engine._words[token] for token in request.ids) for request in (left, right)]
    assert words[0] == "<system> Be brief. <user> one two <assistant> tuned: one two <user> three"
    assert words[1] == "<system> Be brief. <user> one two <assistant> base: one two <user> three"


def test_a_side_that_joins_later_goes_on_from_the_first_ones_answers() -> None:
    turns = [Turn("a", ("A",)), Turn("b", ("B", "C"))]
    assert history(turns, 1, None).turns == [("a", "A"), ("b", "C")]
    assert history(turns, 0, "s").messages("c")[0] == {"role": "system", "content": "s"}


def test_a_side_has_seen_the_prompt_and_each_token_of_its_answer() -> None:
    engine: Any = FakeEngine()
    asked = requests_for(engine, [], "one two", ["tuned"], Sampling(max_new_tokens=2), None)
    [[side]] = Answering(engine, asked).states(apart=1e9)  # what is seldom shown is shown whole at the end
    assert (side.request, side.tokens) == (asked[0], [1, 2])
    assert summary(engine, side).startswith("tuned, 3 + 2 tokens")
    assert summary(engine, side).endswith("cut at max_new_tokens=2")


def test_stopping_ends_both_and_keeps_what_came() -> None:
    engine: Any = FakeEngine(delay=0.05)
    asked = requests_for(engine, [], "one two three four five six", ["tuned", "base"], Sampling(), None)
    answering = Answering(engine, asked)
    for sides in answering.states():
        if all(side.text for side in sides):
            answering.cancel()
    assert [side.end.reason for side in sides if side.end] == ["cancelled", "cancelled"]
    assert all(side.text.startswith(f"{side.request.model}:") and "six" not in side.text for side in sides)
    assert summary(engine, sides[0]).endswith("stopped")


def test_whoever_turns_away_ends_the_answers() -> None:
    engine: Any = FakeEngine(delay=0.2)
    asked = requests_for(engine, [], "one two three", ["tuned", "base"], Sampling(), None)
    states = Answering(engine, asked).states()
    next(states)
    states.close()
    assert all(handle.cancelled.is_set() for handle in engine.handles)


def test_a_refused_second_request_ends_the_first() -> None:
    engine: Any = FakeEngine(delay=0.05)
    asked = requests_for(engine, [], "one two", ["tuned", "base"], Sampling(), None)
    submit = engine.submit

    def refusing(request: Any, listen: Any) -> Any:
        if request.model == "base":
            raise DataError("there is no model")
        return submit(request, listen)

    engine.submit = refusing
    with pytest.raises(DataError, match="there is no model"):
        Answering(engine, asked)
    assert engine.handles[0].cancelled.is_set()


def test_an_engine_that_died_is_no_silent_end() -> None:
    engine: Any = FakeEngine(delay=0.05)
    asked = requests_for(engine, [], "one two", ["tuned", "base"], Sampling(), None)
    answering = Answering(engine, asked)
    engine.failure = EngineError("the engine failed while it answered: out of memory")
    *_, sides = answering.states()
    assert [side.end.error for side in sides if side.end] == [engine.failure] * 2
    assert summary(engine, sides[1]).endswith("the engine failed while it answered: out of memory")
    with pytest.raises(EngineError, match="out of memory"):
        Answering(engine, asked)


def test_cancelling_from_another_thread_ends_the_wait() -> None:
    engine: Any = FakeEngine(delay=30.0)
    asked = requests_for(engine, [], "one", ["tuned"], Sampling(), None)
    answering = Answering(engine, asked)
    threading.Timer(0.05, answering.cancel).start()
    *_, [side] = answering.states()
    assert side.end is not None
    assert side.end.reason == "cancelled"


def test_text_stays_text() -> None:
    routed = Routed([5, 6], [INJECTED, "b"], [[1, 1], [0, 1]], 2)
    for html, shown in (
        (chat_text([{"role": "user", "content": INJECTED}], INJECTED, label=INJECTED), SHOWN),
        (coloured_text(routed, 0, model=INJECTED), SHOWN),
        (legend(2, [(INJECTED, routed)], 0), SHOWN),
        (head(INJECTED), SHOWN),
        (refusal(INJECTED), SHOWN),
    ):
        seen = Seen(html)
        assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "img"}), html
        assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
        assert shown in seen.text
        assert "\u202e" not in seen.text


def test_every_token_has_a_span_and_a_number_where_the_expert_changes() -> None:
    routed = Routed([5, 6, 7, 8, 9], ["a", "", "\U0001f600", "\n", "b"], [[3, 3, 0, 0, 3]], 4)
    seen = Seen(coloured_text(routed, 0, model="tuned"))
    spans = [attributes for tag, attributes in seen.tags if tag == "span"]
    assert [span["title"] for span in spans] == [f"token {i}, expert {e}" for i, e in enumerate(routed.first[0])]
    assert [span["class"] for span in spans] == ["t e3", "t e3", "t e0", "t e0", "t e3"]
    assert [tag for tag, _ in seen.tags].count("sup") == 3
    assert seen.text.strip().endswith("3a0\U0001f600\n3b")
    counted = Seen(legend(4, [("tuned", routed), ("base", routed)], 0))
    assert [line.split() for line in counted.text.strip().splitlines() if line] == [
        ["0", "2", "/", "2"],
        ["1", "0", "/", "0"],
        ["2", "0", "/", "0"],
        ["3", "3", "/", "3"],
        ["tokens", "of", "tuned", "/", "base"],
    ]


def test_the_style_sheet_knows_every_look_of_an_expert() -> None:
    used = {style for look in expert_looks(16) for style in look.style.split()}
    assert [style for style in used | {"hue"} if f".{style} {{" not in style_sheet()] == []
