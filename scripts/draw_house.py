"""Draws docs/house.svg: the rooms of the package in the rows of their imports, a line to each room that one builds on.

    python scripts/draw_house.py           writes it
    python scripts/draw_house.py --check   exit status 1 where it is out of date, which a test asks

Only what no other import implies is drawn: a room that is reached through another has no line of its own, nor has the
ground floor, which anybody may use.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "house.svg"
NOT_DRAWN = {"__init__", "__main__", "quant"}  # the door of the package, and an older name of moe/
GROUND = ("errors", "console", "values", "signals", "private_api", "jsonl", "runfolder", "disk", "report", "web")
WIDTH, ROW, BOX = 1180, 78, (104, 30)


def rooms() -> dict[str, set[str]]:
    """Each room with the rooms that it imports, directly or through others."""
    package, found = ROOT / "finetune", {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        imported = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("finetune."):
                imported.add(node.module.split(".")[1])
    direct = {room: names - NOT_DRAWN - {room} for room, names in found.items() if room not in NOT_DRAWN}

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(other) for other in direct[room]))

    return {room: reached(room) for room in direct}


def rows(reached: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by how many others stand below them, the ground floor first."""
    level = dict.fromkeys(GROUND, 0)
    for room in sorted(reached.keys() - level, key=lambda room: len(reached[room])):
        level[room] = 1 + max((level[other] for other in reached[room]), default=0)
    return [sorted(room for room in level if level[room] == row) for row in range(max(level.values()) + 1)]


def draw() -> str:
    """The picture."""
    reached = rooms()
    floors = rows(reached)
    height = ROW * len(floors) + 20
    place = {}
    for number, floor in enumerate(floors):
        # A floor of one room stands beside the one below, so that lines past it are seen.
        shift = (-150, 150)[number % 2] if len(floor) == 1 else 0
        for column, room in enumerate(floor):
            place[room] = (WIDTH * (column + 1) // (len(floor) + 1) + shift, height - ROW * number - 45)
    lines, boxes = [], []
    for room in sorted(reached):
        x, y = place[room]
        implied = set().union(*(reached[between] for between in reached[room]))
        for other in sorted(reached[room] - implied - set(GROUND)) if room not in GROUND else ():
            to_x, to_y = place[other]
            top, middle = to_y - BOX[1] // 2, (y + to_y) // 2
            lines.append(f'<path d="M{x} {y + BOX[1] // 2}C{x} {middle} {to_x} {middle} {to_x} {top}"/>')
        ground = ' class="ground"' if room in GROUND else ""
        corner = f'x="{x - BOX[0] // 2}" y="{y - BOX[1] // 2}"'
        boxes.append(f'<rect{ground} {corner} width="{BOX[0]}" height="{BOX[1]}" rx="7"/>')
        boxes.append(f'<text x="{x}" y="{y + 5}">{room}</text>')
    style = (
        "svg{background:#fff}path{fill:none;stroke:#8a94a6;stroke-width:1.2;opacity:.75}"
        "rect{fill:#eef3fb;stroke:#0072b2;stroke-width:1.3}"
        ".ground{fill:#f3f3f1;stroke:#8a94a6}text{font:14px system-ui,sans-serif;text-anchor:middle;fill:#14213d}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, f"<style>{style}</style>", *lines, *boxes, "</svg>", ""])


if __name__ == "__main__":
    picture = draw()
    if "--check" in sys.argv[1:]:
        sys.exit(not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture)
    PICTURE.write_text(picture, encoding="utf-8")
