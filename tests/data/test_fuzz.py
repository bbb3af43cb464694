"""No row of any kind ends in a traceback: 1,500 generated ones, each used or refused with a reason; 10,000 if slow.

The rows are broken in the ways in which data sets are: wrong types, nulls, giant strings, lone surrogates, lists in
lists, bad UTF-8, lines that end too early. They take the way of a training run (`rows_of`, `parse`) and of
`data check --fix` (`repair`), as JSON lines and as values.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.check.fix import repair
from finetune.data.forms import parse, to_conversation
from finetune.data.reading import rows_of
from finetune.data.recognition import find_form
from finetune.data.rows import RawChunk, RowFault
from finetune.data.turns import Form

ROWS_AT_A_TIME = 20
FORMS: list[Form] = [
    find_form(row, "auto", columns={}, roles={}, where="here")
    for row in (
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": []},
        {"text": "<|im_start|>user\na<|im_end|>"},
        {"text": "### Human: a### Assistant: b"},
    )
]
# Giant strings come from a few characters, so that what hypothesis keeps and prints stays small.
_GIANTS = ["x" * 300_000, " " * 300_000, "\n" * 100_000, "<|im_start|>" * 500, "### Human:" * 500, "[" * 100_000]
_PIECES = ["", " ", "\ufeff", "\ud800", "\udfff", "\x00", "\x1b", "👍🏽", "مرحبا", "<|im_start|>user\n", "<|im_end|>"]
_PIECES += ["</s>", "### Human:", "### Assistant:", "[INST]"]
giants = st.integers(0, len(_GIANTS) - 1).map(lambda number: _GIANTS[number])
words = st.sampled_from(["Why?", "Because.", "  two\n lines ", "é"])
texts = st.one_of(*[words] * 8, st.lists(st.sampled_from(_PIECES), max_size=3).map("".join), st.text(max_size=5))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, giants)
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2), max_leaves=5
)
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts}), max_size=2)
speakers = st.sampled_from(["user", "assistant", "system", "human", "gpt", "Assistant ", "tool", "prompter"])


@st.composite
def turns(draw: st.DrawFn, role: str, content: str) -> Any:
    """A sound conversation, and then up to two things done to it."""
    contents = draw(st.lists(texts, min_size=2, max_size=4))
    value: Any = [{role: ("user", "assistant")[n % 2], content: text} for n, text in enumerate(contents)]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        turn = value[draw(st.integers(0, len(value) - 1))]
        what = draw(st.sampled_from(["role", "content", "null", "train", "tools", "key", "insert", "nested"]))
        if what == "role":
            turn[role] = draw(speakers | nested)
        elif what == "content":
            turn[content] = draw(giants | parts | nested)
        elif what == "null":
            turn[content] = None
        elif what == "train":
            turn[draw(st.sampled_from(["train", "weight", "loss"]))] = draw(st.sampled_from([0, True, 0.0, 0.5, "1"]))
        elif what == "tools":
            turn["tool_calls"] = draw(nested)
        elif what == "key":
            turn.pop(role, None)
        elif what == "insert":
            value.insert(draw(st.integers(0, len(value))), {role: draw(speakers), content: draw(texts)})
        else:
            value.insert(draw(st.integers(0, len(value))), {role: "user", content: deep(draw(st.integers(0, 400)))})
    return json.dumps(value) if draw(st.integers(0, 9)) == 0 else value


def flat(mark: str, end: str) -> st.SearchStrategy[str]:
    """Text whose turns begin with `mark`, between which a piece may be lost or come in."""
    pieces = st.lists(texts, min_size=2, max_size=5)
    return pieces.map(lambda p: "".join(mark.format(("user", "assistant")[n % 2]) + t + end for n, t in enumerate(p)))


def deep(levels: int) -> Any:
    value: Any = "x"
    for level in range(levels):
        value = [value] if level % 2 else {"content": value}
    return value


human = flat("### {}:", "").map(
    lambda text: text.replace("### user", "### Human").replace("### assistant", "### Assistant")
)
SHAPES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "messages": {"messages": turns("role", "content")},
    "sharegpt": {"conversations": turns("from", "value"), "system": texts | nested},
    "prompt_completion": dict.fromkeys(("prompt", "completion"), texts | turns("role", "content")),
    "alpaca": {
        **dict.fromkeys(("instruction", "output", "input", "system"), st.one_of(*[texts] * 8, nested)),
        "history": st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2) | nested,
    },
    "chatml_text": {"text": flat("<|im_start|>{}\n", "<|im_end|>\n") | texts | giants},
    "human_text": {"text": human | texts | giants},
}


@st.composite
def forms_and_rows(draw: st.DrawFn) -> tuple[Form, list[Any]]:
    form = draw(st.sampled_from(FORMS))
    shaped = st.fixed_dictionaries({}, optional=SHAPES[form.name]) | st.fixed_dictionaries(SHAPES[form.name])
    row = st.one_of(*[shaped] * 7, nested)
    return form, draw(st.lists(row, min_size=ROWS_AT_A_TIME, max_size=ROWS_AT_A_TIME))


def as_lines(values: list[Any], cut: int, broken: int) -> list[bytes]:
    """JSON lines, of which one is cut off, one has bad bytes, and some are no JSON that Python reads."""
    lines = [json.dumps(value).encode() for value in values]
    lines[broken % len(lines)] += b"\xff"
    lines[cut % len(lines)] = lines[cut % len(lines)][: cut % 97]
    return [*lines, b"[" * 100_000, b"1" * 5000, b"", b"\x00"]


def used_and_refused(chunk: RawChunk, form: Form) -> Counter[str]:
    """What `parse` does, checked row by row against the functions that it is made of."""
    parsed = parse(chunk, form)
    counts: Counter[str] = Counter()
    expected: dict[int, Any] = {}
    for position, row in rows_of(chunk):
        assert position not in expected, "one result for a position"
        counts["rows"] += 1
        try:
            if isinstance(row, RowFault):
                raise row
            expected[position] = to_conversation(row, form)
            counts["used"] += 1
        except RowFault as fault:
            expected[position] = str(fault)
            counts["refused"] += 1
    for _, reason in parsed.refused:
        assert 0 < len(reason.encode("utf-8")) < 200, "a reason, and not the row itself"
    assert dict(parsed.refused) | dict(zip(parsed.positions, parsed.conversations, strict=True)) == expected
    return counts


def repairs(chunk: RawChunk, form: Form) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _, row in rows_of(chunk):
        if isinstance(row, RowFault):
            continue
        try:
            conversation, done = repair(row, form)
        except RowFault:
            counts["beyond repair"] += 1
            continue
        counts["repaired" if done else "sound"] += 1
        again, nothing = repair({"messages": conversation}, FORMS[0])
        assert again == conversation, "what is repaired is sound"
        assert not nothing
        assert to_conversation({"messages": conversation}, FORMS[0]) == conversation
    return counts


@pytest.mark.parametrize("times", [75, pytest.param(500, marks=pytest.mark.slow)])
def test_rows_are_used_or_refused(times: int) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(forms_and_rows(), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
    def one(drawn: tuple[Form, list[Any]], cut: int, broken: int) -> None:
        form, values = drawn
        for chunk in (RawChunk(0, 1, values=values), RawChunk(0, 7, lines=as_lines(values, cut, broken))):
            counts = used_and_refused(chunk, form)
            assert counts["used"] + counts["refused"] == counts["rows"]
            seen.update(counts + repairs(chunk, form))
        seen["generated"] += len(values)

    one()
    assert seen["generated"] >= times * ROWS_AT_A_TIME
    for outcome in ("used", "refused", "repaired", "sound", "beyond repair"):
        assert seen[outcome] > 50, f"the rows are not various enough: {dict(seen)}"
