"""The house rules that a machine can keep: imports run one way, heavy packages stay where they belong.

Read from the source with `ast`, so nothing is imported and an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "finetune"

# A room imports only from rows above its own; rooms in one row do not import each other.
# `evaluate` stands above `export`, because a merge measures its fidelity; `train` ends by pushing, with `export`.
ROWS = (
    ("errors", "console", "values"),
    ("arch", "kernels", "checkpoint", "runfolder", "jsonl", "signals", "web"),
    ("recipe",),
    (
        "quant",
        "data",
        "trainable",
        "routing",
        "skeleton",
        "attention",
        "fused_layers",
        "activations",
        "memory",
        "progress",
        "stopping",
    ),
    ("model",),
    ("adapter",),
    ("datacheck", "routerwatch", "preflight", "trainer", "summary", "evaluate", "infer", "loggers"),
    ("routerstudy", "export"),
    ("train", "evaluation"),
    ("bench", "chat", "serve"),
    ("cli",),
    ("__main__", "__init__"),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib"}
HEAVY |= {"wandb", "tensorboard", "trackio"}
# What must answer in well under a second: a wrong recipe, `--help`, the arithmetic of a preflight.
LIGHT = {"__init__", "__main__", "errors", "console", "values", "recipe", "arch", "checkpoint", "runfolder", "signals"}
LIGHT |= {"memory", "cli"}


def imports(source: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of everything imported, `from a import b` as `a.b`; TYPE_CHECKING blocks are not top level."""
    tree = ast.parse(source)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    """Rooms of the package that a source imports; what `finetune` itself offers is the room `__init__`."""
    parts = [name.split(".") for name in imports(source) if name.split(".")[0] == "finetune"]
    return {names[1] if len(names) > 1 and names[1] in ROW_OF else "__init__" for names in parts}


def faults_of(room: str, source: str) -> list[str]:
    return [
        f"{room} (row {ROW_OF[room]}) imports {other} (row {ROW_OF[other]})"
        for other in sorted(rooms_imported(source))
        if other != room and ROW_OF[other] >= ROW_OF[room]
    ]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_row():
    unknown = sorted({room_of(path) for path in FILES} - set(ROW_OF))
    assert not unknown, f"give {unknown} a row in {Path(__file__).name} and in CONTRIBUTING.md"


def test_the_map_in_contributing_names_every_room():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert not [room for room in sorted(rooms) if f"`{room}`" not in text and f"`{room}/`" not in text]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    assert faults_of(room_of(path), path.read_text()) == []


def test_the_check_sees_what_it_should():
    assert faults_of("arch", "from finetune.errors import ModelError") == []
    assert faults_of("arch", "import finetune.moe.load") == ["arch (row 1) imports model (row 4)"]
    assert faults_of("data", "def f():\n    from finetune.moe import QuantizedExperts") == [
        "data (row 3) imports quant (row 3)"
    ]
    assert faults_of("data", "from finetune import memory") == ["data (row 3) imports memory (row 3)"]
    assert faults_of("data", "from finetune import Moe4bitConfig") == ["data (row 3) imports __init__ (row 11)"]
    assert faults_of("quant", "from finetune.moe.config import Moe4bitConfig") == []


def test_matplotlib_only_draws_in_routing_plots():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == "matplotlib" for name in imports(path.read_text()))
    }
    assert users <= {"router/plots.py"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) in LIGHT], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_light_rooms_import_nothing_heavy(path: Path):
    top = {name.split(".")[0] for name in imports(path.read_text(), top_level_only=True)}
    assert not top & HEAVY
    rooms = {name.split(".")[1] for name in imports(path.read_text(), top_level_only=True) if "finetune." in name}
    assert rooms <= LIGHT


def test_only_arch_knows_the_names_of_the_fused_parameters():
    # Docstrings may talk about gate_up_proj; code gets it from arch.EXPERT_PROJECTIONS.
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("gate_up_proj", "down_proj"):
                users.add(str(path.relative_to(PACKAGE)))
    assert users == {"arch.py"}
