"""The house rules that a machine can keep: imports run one way, a room has one door, heavy packages stay where they
belong.

Read from the source with `ast`, so nothing is imported and an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from finetune.private_api import INHERITED

PACKAGE = Path(__file__).parents[1] / "finetune"

# A room imports only from rows above its own; rooms in one row do not import each other.
ROWS = (
    ("errors", "console", "values", "signals", "private_api"),
    ("checkpoint", "disk", "kernels", "report", "web"),
    ("jsonl", "moe", "runfolder"),
    ("recipe", "quant"),
    ("data", "run_files"),
    ("adapter", "memory"),
    ("infer", "router", "starter"),
    ("chat", "evaluate", "serve"),
    ("export",),
    ("train",),
    ("bench",),
    ("cli",),
    ("__main__", "__init__"),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib"}
HEAVY |= {"wandb", "tensorboard", "trackio"}
# What must answer in well under a second: a wrong recipe, `--help`, the arithmetic of a preflight.
LIGHT = {
    "__init__",
    "__main__",
    "errors",
    "console",
    "values",
    "recipe",
    "checkpoint",
    "disk",
    "runfolder",
    "signals",
    "cli",
}
LIGHT |= {
    "signals",
    "cli",
    "private_api",
    "moe/arch.py",
    "memory/advice.py",
    "memory/run.py",
    "memory/static.py",
    "memory/step.py",
    "memory/totals.py",
}

FILES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
DOORS = {path.parent.name: path.read_text() for path in sorted(PACKAGE.glob("*/__init__.pyi"))}
INSIDE = {path.name for path in PACKAGE.iterdir() if path.is_dir()}


parse = functools.cache(ast.parse)


def imports(source: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of everything imported, `from a import b` as `a.b`; TYPE_CHECKING blocks are not top level."""
    tree = parse(source)
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
    for node in parse(DOORS.get(door, "")).body:
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


def test_the_package_does_without_what_lies_beside_it():
    beside = {"bench", "scripts", "tests"}
    users = {n for n, source in FILES.items() if any(name.split(".")[0] in beside for name in imports(source))}
    assert users == set()


def test_the_check_sees_what_it_should():
    assert faults_of("moe", "from finetune.errors import ModelError") == []
    assert faults_of("moe", "from finetune.moe.config import Moe4bitConfig") == []
    assert faults_of("moe", "import finetune.train") == ["moe (row 2) imports train (row 9)"]
    assert faults_of("adapter", "def f():\n    from finetune.memory import Run") == [
        "adapter (row 5) imports memory (row 5)"
    ]
    assert faults_of("data", "from finetune import memory") == ["data (row 4) imports memory (row 5)"]
    assert faults_of("data", "from finetune import Moe4bitConfig") == ["data (row 4) imports __init__ (row 12)"]
    assert faults_of("data", "from finetune.moe.arch import MoeArch") == [
        "data goes past the door: finetune.moe.arch.MoeArch"
    ]
    assert behind("moe", "MoeArch") == "moe/arch.py"


def test_the_picture_of_the_house_is_of_these_imports():
    done = subprocess.run([sys.executable, PACKAGE.parent / "scripts" / "draw_house.py", "--check"], check=False)
    assert done.returncode == 0, "run `python scripts/draw_house.py` and look at docs/house.svg"


def test_a_door_offers_what_somebody_takes():
    taken = {parts[:2] for name, source in FILES.items() for parts in ours(source) if parts[0] != room_of(name)}
    offered = {
        (room, alias.name)
        for room, door in DOORS.items()
        for node in parse(door).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert offered - taken == set()


def test_matplotlib_only_draws_in_report_and_router_plots():
    users = {n for n, source in FILES.items() if any(name.split(".")[0] == "matplotlib" for name in imports(source))}
    assert users == {"report/figures.py", "report/panels.py", "router/plots.py"}


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
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Constant) and node.value in ("gate_up_proj", "down_proj")
    }
    assert users == {"moe/arch.py"}


# ---- private interfaces of other packages -------------------------------------------------------------------------

# Documented in spite of their underscore: of `NamedTuple`, and `os._exit`.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit"}


def is_private(name: str) -> bool:
    return len(name) > 1 and name.startswith("_") and not name.startswith("__")


def defined_privately(name: str, source: str) -> set[str]:
    """The private names that a file gives to something itself, without what its classes take over from upstream."""
    tree, found = parse(source), set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Attribute(value=ast.Name("self" | "cls"), ctx=ast.Store()):
                found.add(node.attr)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
    return {each for each in found if is_private(each)} - inherited_by(name)


def inherited_by(name: str) -> set[str]:
    """What private_api.py allows the classes of a file to take over."""
    module = f"finetune.{name.removesuffix('.py').replace('/', '.')}:"
    listed = [each for ours, each in INHERITED.items() if ours.startswith(module)]
    return {private for each in listed for private in (*each.methods, *each.attributes)}


def private_faults(name: str, source: str, ours: set[str]) -> list[str]:
    """Private names of other packages that a file imports or reads; its own classes may read what they inherit."""
    inherited, faults = inherited_by(name), []
    for node in ast.walk(parse(source)):
        match node:
            case ast.Import() | ast.ImportFrom():
                module = node.module if isinstance(node, ast.ImportFrom) else None
                names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
                faults += [f"import {each}" for each in names if any(map(is_private, each.split(".")))]
            case ast.Attribute(attr=attr, value=value) if is_private(attr) and attr not in ours | PUBLIC:
                on_itself = ast.unparse(value) in ("self", "cls", "super()")
                if not (on_itself and attr in inherited):
                    faults.append(ast.unparse(node))
    return faults


def test_only_private_api_uses_private_names_of_other_packages():
    ours = {private for name, source in FILES.items() for private in defined_privately(name, source)}
    found = {name: faults for name, source in FILES.items() if (faults := private_faults(name, source, ours))}
    assert set(found) == {"private_api.py"}, found


def test_the_check_sees_private_names():
    assert private_faults("moe/x.py", "torch._assert_async(x)", set()) == ["torch._assert_async"]
    assert private_faults("moe/x.py", "from lm_eval.tasks._index import Kind", set()) == [
        "import lm_eval.tasks._index.Kind"
    ]
    assert private_faults("moe/x.py", "from trl import _CHUNK", set()) == ["import trl._CHUNK"]
    assert private_faults("moe/x.py", "self._mine, rows._replace(a=1), x.__dict__", {"_mine"}) == []
    assert private_faults("moe/experts.py", "super()._apply(fn)", set()) == []
    assert private_faults("moe/experts.py", "module._apply(fn)", set()) == ["module._apply"]
    assert private_faults("moe/load.py", "self._apply(fn)", set()) == ["self._apply"]
    assert defined_privately("moe/experts.py", "def _apply(self): self._x = 1") == {"_x"}
