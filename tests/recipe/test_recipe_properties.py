"""Whatever the file holds, loading gives a Recipe or a RecipeError that can be printed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import RecipeError
from finetune.recipe import yaml12
from finetune.recipe.load import load_recipe, resolved_yaml
from finetune.recipe.schema import Recipe, recipe_schema
from finetune.recipe.training import open_fields

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["nf4", "16bit", "non_moe", "no", "epoch", "./x", "../x", "~/x", "2e-4", "q_proj", "auto"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
SECTION_SCHEMAS = {
    name: recipe_schema()["$defs"][f"{name.capitalize()}Section"] for name in Recipe.model_fields if name != "training"
}
KEYS: dict[str, list[str]] = {
    "training": sorted(open_fields()),
    **{name: sorted(section["properties"]) for name, section in SECTION_SCHEMAS.items()},
}
SECTIONS = st.sampled_from(sorted(KEYS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.dictionaries(st.sampled_from(KEYS[name]) | TEXT, VALUES, max_size=4) | VALUES
    )
)
VALID = {"model": {"path": "m"}, "data": {"train": "d", "eval_split": "e"}, "output": {"dir": "o"}}


def load(content: bytes, overrides: list[str] | None = None) -> Recipe | None:
    """The recipe, or None for a RecipeError; anything else escapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(content)
        outcome: Recipe | RecipeError
        try:
            outcome = load_recipe(path, overrides or [])
        except RecipeError as error:
            outcome = error
        if isinstance(outcome, RecipeError):
            assert str(outcome).encode("utf-8")
            assert all(fault.where for fault in outcome.faults)
            return None
        path.write_text(resolved_yaml(outcome), encoding="utf-8")
        assert load_recipe(path) == outcome
        return outcome


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | TEXT.map(str.encode))
def test_any_bytes(content: bytes) -> None:
    load(content)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("amodel: \n-[]{}!&*#'\"|>?,%@\\U0x1."), max_size=40))
def test_text_of_yaml_punctuation(text: str) -> None:
    load(text.encode())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(SECTIONS, max_size=4))
def test_a_valid_recipe_with_anything_put_into_it(sections: list[tuple[str, object]]) -> None:
    values: dict[str, object] = dict(VALID)
    for name, section in sections:
        base = values.get(name)
        values[name] = base | section if isinstance(base, dict) and isinstance(section, dict) else section
    load(yaml12.dump(values).encode())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["model.path=", "training.seed=", "trainable.lora.r=", "output=", ""]), max_size=2), TEXT
)
def test_any_override(starts: list[str], rest: str) -> None:
    load(yaml12.dump(VALID).encode(), [start + rest for start in starts])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.builds(
        lambda r, dropout, revision, rate, steps: {
            **VALID,
            "model": {"path": "./m", "revision": revision},
            "trainable": {"lora": {"r": r, "dropout": dropout}},
            "training": {"learning_rate": rate, "max_steps": steps, "optim_args": revision},
        },
        st.integers(1, 512),
        st.floats(0, 1, exclude_max=True),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
        st.floats(0, 1e3),
        st.integers(-1, 10**12),
    )
)
def test_what_is_valid_loads_as_given(values: dict[str, dict]) -> None:
    recipe = load(yaml12.dump(values).encode())
    assert recipe is not None
    assert recipe.trainable.lora.r == values["trainable"]["lora"]["r"]
    assert recipe.trainable.lora.dropout == values["trainable"]["lora"]["dropout"]
    assert recipe.model.revision == values["model"]["revision"]
    assert recipe.training["learning_rate"] == values["training"]["learning_rate"]
