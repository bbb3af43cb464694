"""The fields read from source against those of the imported library."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

import pytest
from transformers.training_args import trainer_log_levels
from trl import SFTConfig

from finetune.errors import FinetuneError
from finetune.recipe.training_fields import UNKNOWN, Accepts, package_folder, read_fields, training_fields

LIBRARY = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}


def library_default(field: dataclasses.Field) -> object:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return default.value if isinstance(default, enum.Enum) else default


def test_names_and_order_are_those_of_the_dataclass() -> None:
    assert list(training_fields()) == list(LIBRARY)


def test_defaults_are_those_of_the_dataclass() -> None:
    computed = [name for name, field in training_fields().items() if field.default is UNKNOWN]
    assert computed == ["optim"]
    for name, field in training_fields().items():
        if name not in computed:
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


def test_annotations_in_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(
        "if TYPE_CHECKING:\n    from .sub import Config as Config\n",
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text("from .impl import Config")
    (tmp_path / "sub" / "impl.py").write_text(
        "from ..kinds import Kind as K, Plain\n"
        "import typing\n"
        "class Config(Base):\n"
        "    a: typing.Optional[int] = None\n"
        "    b: 'Union[str, List[int], None]' = field(default_factory=list, metadata={'help': '5%%', 'x': f()})\n"
        "    c: Literal['x', 3, None] = 'x'\n"
        "    d: Optional[K] = field(default=K.A)\n"
        "    e: Plain = None\n"
        "    f: ClassVar[int] = 3\n"
        "    g: int = field(init=False)\n"
        "    h: Elsewhere | int = 1\n"
        "    i: list = field(default_factory=dict)\n"
        "    gone: ClassVar[str] = ''\n"
        "    renewed: float = 0.5\n"
        "    required: Dict[str, int]\n"
        "    unannotated = 3\n"
        "class Base:\n"
        "    renewed: int = 1\n"
        "    gone: int = 1\n"
    )
    (tmp_path / "kinds.py").write_text("class Kind(str, Enum):\n    A = 'a'\n    B = 'b'\nclass Plain:\n    A = 'a'\n")
    fields = read_fields({"pkg": tmp_path}, "pkg", "Config")
    assert {name: field.accepts for name, field in fields.items()} == {
        "renewed": Accepts(("number",)),
        "a": Accepts(("integer", "null")),
        "b": Accepts(("string", "array", "null"), items=Accepts(("integer",))),
        "c": Accepts(("null",), ("x", 3)),
        "d": Accepts(("null",), ("a", "b")),
        "e": Accepts(),
        "h": Accepts(),
        "i": Accepts(("array",)),
        "required": Accepts(("object",)),
    }
    assert next(iter(fields)) == "renewed"
    assert {name: field.default for name, field in fields.items()} == {
        "renewed": 0.5,
        "a": None,
        "b": [],
        "c": "x",
        "d": UNKNOWN,
        "e": None,
        "h": 1,
        "i": {},
        "required": UNKNOWN,
    }
    assert fields["b"].help == "5%"


def test_json_schema_of_what_is_accepted() -> None:
    assert Accepts().json_schema() == {}
    assert Accepts(("integer",)).json_schema() == {"type": "integer"}
    assert Accepts(("integer", "null")).json_schema() == {"type": ["integer", "null"]}
    assert Accepts(choices=("a", "b")).json_schema() == {"enum": ["a", "b"]}
    assert Accepts(("null",), ("a",)).json_schema() == {"enum": ["a", None]}
    assert Accepts(("boolean",), ("a",)).json_schema() == {"anyOf": [{"enum": ["a"]}, {"type": "boolean"}]}
    listed = Accepts(("array",), items=Accepts(("string",)))
    assert listed.json_schema() == {"type": "array", "items": {"type": "string"}}


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(FinetuneError) as caught:
        package_folder("a_package_nobody_has")
    assert str(caught.value) == (
        "the package a_package_nobody_has is not installed\n  fix: pip install a_package_nobody_has"
    )


def test_a_package_without_the_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(FinetuneError) as caught:
        read_fields({"pkg": tmp_path}, "pkg", "Config")
    assert str(caught.value) == (
        f"pkg has no Config where one was expected\n  where: {tmp_path}\n"
        "  fix: install a release of pkg that this toolkit supports (see constraints.txt)"
    )
