"""The bundled table of fields against those of the imported library."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import typing
from pathlib import Path

import pytest
from transformers.training_args import trainer_log_levels
from trl import SFTConfig

from finetune.errors import FinetuneError
from finetune.recipe import training_fields as training_fields_module
from finetune.recipe.training_fields import Accepts, installed_releases, read_fields, training_fields

LIBRARY = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}


def library_default(field: dataclasses.Field) -> object:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return default.value if isinstance(default, enum.Enum) else default


def test_names_and_order_are_those_of_the_dataclass() -> None:
    assert list(training_fields()) == list(LIBRARY)


def test_defaults_are_those_of_the_dataclass() -> None:
    for name, field in training_fields().items():
        assert field.default == library_default(LIBRARY[name]), name
        assert type(field.default) is type(library_default(LIBRARY[name])), name


def test_every_default_of_the_library_is_accepted() -> None:
    for name, field in training_fields().items():
        assert field.accepts.takes(library_default(LIBRARY[name])), name


def test_help_is_that_of_the_dataclass() -> None:
    for name, field in training_fields().items():
        assert field.help == LIBRARY[name].metadata.get("help", "").replace("%%", "%"), name
    assert all(field.help for field in training_fields().values())


def test_choices_are_those_of_the_metadata_and_the_enums() -> None:
    config = SFTConfig(output_dir="unused", bf16=False, use_cpu=True)
    enums = [name for name in LIBRARY if isinstance(getattr(config, name), enum.Enum)]
    assert {"eval_strategy", "save_strategy", "logging_strategy", "lr_scheduler_type", "optim"} <= set(enums)
    for name in enums:
        values = {member.value for member in type(getattr(config, name))}
        assert set(training_fields()[name].accepts.choices) == values, name
        assert not training_fields()[name].accepts.takes("none of them"), name
    for name, field in LIBRARY.items():
        if field.metadata.get("choices"):
            assert set(training_fields()[name].accepts.choices) == set(field.metadata["choices"]), name


def test_log_levels_are_those_of_transformers() -> None:
    assert set(training_fields()["log_level"].accepts.choices) == set(trainer_log_levels)


def test_only_a_type_of_another_package_accepts_anything() -> None:
    assert [name for name, field in training_fields().items() if field.accepts.anything] == ["parallelism_config"]


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("learning_rate", 1, True),
        ("learning_rate", 2e-4, True),
        ("learning_rate", True, False),
        ("learning_rate", None, False),
        ("learning_rate", float("inf"), False),
        ("max_steps", 1.0, False),
        ("max_steps", False, False),
        ("packing", True, True),
        ("packing", 1, False),
        ("packing", "true", False),
        ("max_length", None, True),
        ("fsdp", True, True),
        ("fsdp", "full_shard", True),
        ("gradient_checkpointing_kwargs", {"use_reentrant": False}, True),
        ("gradient_checkpointing_kwargs", [1], False),
        ("label_names", ["labels"], True),
        ("label_names", ["labels", 3], False),
        ("label_names", "labels", False),
        ("optim_target_modules", "all-linear", True),
        ("debug", ["underflow_overflow"], True),
        ("debug", ["overflow"], False),
        ("trackio_static_space_id", False, True),
        ("trackio_static_space_id", 0, False),
        ("include_num_input_tokens_seen", True, True),
        ("include_num_input_tokens_seen", "some", False),
        ("pad_to_multiple_of", "auto", True),
        ("pad_to_multiple_of", "eight", False),
        ("ddp_backend", None, True),
        ("ddp_backend", "nvlink", False),
    ],
)
def test_what_a_field_takes(name: str, value: object, taken: bool) -> None:
    assert training_fields()[name].accepts.takes(value) is taken


class Kind(enum.Enum):
    A = "a"
    B = "b"


@dataclasses.dataclass
class Base:
    renewed: int = 1
    help_only: str = dataclasses.field(default="x", metadata={"help": "5%%"})


@dataclasses.dataclass
class Spellings(Base):
    """Annotations as `SFTConfig` and its bases write them, in every spelling that Python has."""

    a: typing.Optional[int] = None  # noqa: UP045
    b: "typing.Union[str, typing.List[int], None]" = dataclasses.field(default_factory=list)  # noqa: UP006, UP007, UP037
    c: typing.Literal["x", 3, None] = "x"
    d: Kind | str | None = Kind.A
    e: Path | None = None
    f: typing.ClassVar[int] = 3
    g: int = dataclasses.field(init=False)
    h: list = dataclasses.field(default_factory=list)  # type: ignore[type-arg]
    i: typing.Dict[str, int] | None = None  # noqa: UP006
    j: str | None = dataclasses.field(default=None, metadata={"nargs": "?", "const": True})
    renewed: float = 0.5


def test_annotations_in_every_spelling() -> None:
    fields = read_fields(Spellings)
    assert {name: field.accepts for name, field in fields.items()} == {
        "renewed": Accepts(("number",)),
        "help_only": Accepts(("string",)),
        "a": Accepts(("integer", "null")),
        "b": Accepts(("string", "array", "null"), items=Accepts(("integer",))),
        "c": Accepts(("null",), ("x", 3)),
        "d": Accepts(("null",), ("a", "b")),
        "e": Accepts(),
        "h": Accepts(("array",)),
        "i": Accepts(("object", "null")),
        "j": Accepts(("boolean", "string", "null")),
    }
    assert next(iter(fields)) == "renewed"
    defaults = {"renewed": 0.5, "help_only": "x", "a": None, "b": [], "c": "x", "d": "a", "e": None, "h": [], "i": None}
    assert {name: field.default for name, field in fields.items()} == defaults | {"j": None}
    assert fields["help_only"].help == "5%"


def test_json_schema_of_what_is_accepted() -> None:
    assert Accepts().json_schema() == {}
    assert Accepts(("integer",)).json_schema() == {"type": "integer"}
    assert Accepts(("integer", "null")).json_schema() == {"type": ["integer", "null"]}
    assert Accepts(choices=("a", "b")).json_schema() == {"enum": ["a", "b"]}
    assert Accepts(("null",), ("a",)).json_schema() == {"enum": ["a", None]}
    assert Accepts(("boolean",), ("a",)).json_schema() == {"anyOf": [{"enum": ["a"]}, {"type": "boolean"}]}
    listed = Accepts(("array",), items=Accepts(("string",)))
    assert listed.json_schema() == {"type": "array", "items": {"type": "string"}}


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(FinetuneError) as caught:
        installed_releases()
    assert str(caught.value) == "the package trl is not installed\n  fix: pip install trl"


@pytest.mark.parametrize("releases", [{"trl": "1.16.0", "transformers": "0"}, {"trl": "0", "transformers": "0"}])
def test_other_releases_are_read_from_the_library(monkeypatch: pytest.MonkeyPatch, releases: dict[str, str]) -> None:
    """The bundled table says what the library says, and is not read for another release."""
    bundled = training_fields()
    monkeypatch.setattr(training_fields_module, "installed_releases", lambda: releases)
    imported = training_fields.__wrapped__()
    assert imported == bundled
    assert imported is not bundled
