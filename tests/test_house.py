"""The house rules that a machine can keep: imports run one way, a room has one door, heavy packages stay where they
belong.

Read from the source with `ast`, so nothing is imported and an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "finetune"

# A room imports only from rows above its own; rooms in one row do not import each other.
ROWS = (
    ("errors", "console", "values", "progress", "signals"),
    ("checkpoint", "jsonl", "kernels", "runfolder", "web"),
    ("moe",),
    ("adapter", "recipe", "quant"),
    ("data",),
    ("memory", "router"),
    ("evaluate", "infer", "summary"),
    ("chat", "export", "serve"),
    ("evaluation", "train"),
    ("bench",),
    ("cli",),
    ("__main__", "__init__"),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib"}
HEAVY |= {"wandb", "tensorboard", "trackio"}
# What must answer in well under a second: a wrong recipe, `--help`, the arithmetic of a preflight.
LIGHT = {"__init__", "__main__", "errors", "console", "values", "recipe", "checkpoint", "runfolder", "signals", "cli"}
LIGHT |= {"moe/arch.py", "memory/run.py", "memory/static.py", "memory/step.py", "memory/totals.py"}

FILES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
DOORS = {path.parent.name: path.read_text() for path in sorted(PACKAGE.glob("*/__init__.pyi"))}
INSIDE = {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def imports(source: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of everything imported, `from a import b` as `a.b`; TYPE_CHECKING blocks are not top level."""
    tree = ast.parse(source)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source: str, *, top_level_only: bool = False) -> set[tuple[str, ...]]:
    """What a source imports of this package, without `finetune`; what `finetune` itself offers is in `__init__`."""
    names = [name.split(".") for name in imports(source, top_level_only=top_level_only)]
    found = {tuple(parts[1:]) for parts in names if parts[0] == "finetune"}
    return {parts if parts and parts[0] in ROW_OF else ("__init__", *parts) for parts in found}


def room_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def faults_of(room: str, source: str) -> list[str]:
    """Imports from a lower row, and imports that go past the door of another room."""
    faults = []
    for other, *inside in sorted(ours(source)):
        if other == room:
            continue
        if ROW_OF[other] >= ROW_OF[room]:
            faults.append(f"{room} (row {ROW_OF[room]}) imports {other} (row {ROW_OF[other]})")
        if other in INSIDE and len(inside) > 1:
            faults.append(f"{room} goes past the door: finetune.{'.'.join((other, *inside))}")
    return faults


def behind(door: str, name: str) -> str:
    """The file behind a room's door that a name comes from: `moe`, `MoeArch` gives `moe/arch.py`."""
    for node in ast.parse(DOORS.get(door, "")).body:
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return f"{door}/{node.module.replace('.', '/')}.py"
    return f"{door}.py"


def test_every_room_has_a_row_and_a_line_in_contributing():
    rooms = {room_of(name) for name in FILES}
    assert not rooms - set(ROW_OF), "give them a row here and in CONTRIBUTING.md"
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    assert not [room for room in rooms - {"__init__"} if f"`{room}`" not in text and f"`{room}/`" not in text]


def test_imports_run_one_way_and_through_doors():
    assert {name: faults for name, source in FILES.items() if (faults := faults_of(room_of(name), source))} == {}


def test_the_check_sees_what_it_should():
    assert faults_of("moe", "from finetune.errors import ModelError") == []
    assert faults_of("moe", "from finetune.moe.config import Moe4bitConfig") == []
    assert faults_of("moe", "import finetune.train") == ["moe (row 2) imports train (row 8)"]
    assert faults_of("adapter", "def f():\n    from finetune.recipe import Recipe") == [
        "adapter (row 3) imports recipe (row 3)"
    ]
    assert faults_of("data", "from finetune import memory") == ["data (row 4) imports memory (row 5)"]
    assert faults_of("data", "from finetune import Moe4bitConfig") == ["data (row 4) imports __init__ (row 11)"]
    assert faults_of("data", "from finetune.moe.arch import MoeArch") == [
        "data goes past the door: finetune.moe.arch.MoeArch"
    ]
    assert behind("moe", "MoeArch") == "moe/arch.py"


def test_a_door_offers_what_somebody_takes():
    taken = {parts[:2] for name, source in FILES.items() for parts in ours(source) if parts[0] != room_of(name)}
    offered = {
        (room, alias.name)
        for room, door in DOORS.items()
        for node in ast.parse(door).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert offered - taken == set()


def test_matplotlib_only_draws_in_router_plots():
    users = {n for n, source in FILES.items() if any(name.split(".")[0] == "matplotlib" for name in imports(source))}
    assert users <= {"router/plots.py"}


def test_light_files_import_nothing_heavy():
    def is_light(name: str) -> bool:
        return room_of(name) in LIGHT or name in LIGHT

    for name in filter(is_light, FILES):
        top = {name.split(".")[0] for name in imports(FILES[name], top_level_only=True)}
        assert not top & HEAVY, name
        for room, *inside in ours(FILES[name], top_level_only=True):
            target = "/".join((room, *inside[:-1])) + ".py" if len(inside) > 1 else behind(room, "".join(inside))
            assert is_light(target), f"{name} imports {target}"


def test_only_arch_knows_the_names_of_the_fused_parameters():
    # Docstrings may talk about gate_up_proj; code gets it from arch.EXPERT_PROJECTIONS.
    users = {
        name
        for name, source in FILES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in ("gate_up_proj", "down_proj")
    }
    assert users == {"moe/arch.py"}
