"""The YAML of recipes: types of the 1.2 core schema, places of every key, and faults of the notation."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe import yaml12

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


def parse(text: str) -> yaml12.Document:
    return yaml12.parse(text, lambda line, column: f"f:{line}" if column is None else f"f:{line}:{column}")


def fault(text: str) -> str:
    (only,) = parse(text).faults
    return str(only)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("2e-4", 2e-4),
        ("1E3", 1e3),
        (".5", 0.5),
        ("-3.", -3.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("null", None),
        ("'2e-4'", "2e-4"),
        ('"true"', "true"),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
        ("[q_proj, 1, null]", ["q_proj", 1, None]),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, expected: object) -> None:
    document = parse(text)
    assert document.faults == []
    assert document.value == expected
    assert type(document.value) is type(expected)


@given(VALUES)
def test_json_reads_as_json_reads_it(value: object) -> None:
    # YAML 1.2 contains JSON; json.dumps escapes everything that is not ASCII, surrogate pairs excepted by YAML.
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        document = parse(text)
        assert document.faults == []
        assert document.value == json.loads(text)


@given(VALUES)
def test_dump_reads_back_here_and_in_yaml_1_1(value: object) -> None:
    text = yaml12.dump(value)
    assert parse(text).value == value
    assert parse(text).faults == []
    assert yaml.safe_load(text) == value


def test_dump_writes_tuples_as_lists_and_keeps_the_order() -> None:
    assert yaml12.dump({"b": ("x", "no"), "a": "2e-4"}) == "b:\n- x\n- 'no'\na: '2e-4'\n"


def test_every_key_and_item_has_its_line() -> None:
    document = parse("# comment\na:\n  b: 1\n  c:\n    - x\n    - y: 2\n")
    assert document.places == {
        (): "f:2",
        ("a",): "f:2",
        ("a", "b"): "f:3",
        ("a", "c"): "f:4",
        ("a", "c", 0): "f:5",
        ("a", "c", 1): "f:6",
        ("a", "c", 1, "y"): "f:6",
    }


def test_a_key_written_twice_is_refused_with_both_lines() -> None:
    assert fault("a:\n  r: 1\n  s: 2\n  r: 3\n") == (
        "`r` is written twice, first at f:2\n  where: f:4: a.r\n  fix: keep one of the two"
    )


def test_the_first_of_two_equal_keys_is_kept_for_further_checks() -> None:
    assert parse("r: 1\nr: 3\n").value == {"r": 1}


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("a: [1", "not valid YAML: expected ',' or ']', but got '<stream end>'", "f:1:6"),
        ("a: 1\n\tb: 2", "not valid YAML: found character '\\t' that cannot start any token", "f:2:1"),
        ("a: 1\nb: \x01", "not valid YAML: the character '\\x01' is not allowed", "f:2:4"),
        ("a: 1\n--- \nb: 2", "not valid YAML: but found another document", "f:2:1"),
        ("a: &x 1\nb: *x", "not valid YAML: anchors and aliases are not used in recipes", "f:2:4"),
        ("a: &x [*x]", "not valid YAML: anchors and aliases are not used in recipes", "f:1:8"),
        ("[" * 33, "not valid YAML: nested deeper than 32 levels", "f:1:33"),
        ('a: "\\UFFFFFFFF"', "not valid YAML: an escape names no Unicode character", "f:1:7"),
        ('a: "\\U00110000"', "not valid YAML: an escape names no Unicode character", "f:1:7"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "the YAML tag `!!python/object/apply:os.system` is not used",
            "f:1: a",
        ),
        ("a: !secret x", "the YAML tag `!secret` is not used in recipes", "f:1: a"),
        ("a: !!set {x}", "the YAML tag `!!set` is not used in recipes", "f:1: a"),
        ("a: .nan", "'.nan' is not a usable number", "f:1: a"),
        ("a: -.inf", "'-.inf' is not a usable number", "f:1: a"),
        ("a: 1e999", "'1e999' is not a usable number", "f:1: a"),
        ("a: " + "9" * 5000, "9... is not a usable number", "f:1: a"),
        ("a: " + "9" * 900, "9... is too large", "f:1: a"),
        ("a: 0x" + "f" * 16, "'0xffffffffffffffff' is too large", "f:1: a"),
        ("a: !!int x", "'x' is not a usable number", "f:1: a"),
        ('a: "\\uD800"', "'\\ud800' holds a character that no file can hold", "f:1: a"),
        ('a: "x\\0"', "'x\\x00' holds a character that no file can hold", "f:1: a"),
        ("1: x", "1 is not a name", "f:1"),
        ("a:\n  null: x", "null is not a name", "f:2: a"),
        ("? [a]\n: x", "a key is not a name", "f:1"),
    ],
)
def test_notation_that_recipes_do_not_use(text: str, what: str, where: str) -> None:
    (only,) = parse(text).faults
    assert what in only.what
    assert only.where == where
    assert only.fix is not None
