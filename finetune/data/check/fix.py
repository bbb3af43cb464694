"""A corrected copy of a recipe's data: what can be mended is mended, the rest is set apart, and both are counted.

`DIR/<source>.jsonl` holds one {"messages": [...]} a line, beside whatever else the row held, and equal conversations
once; `DIR/refused.jsonl` the rows that cannot be corrected, with where they were and why; `DIR/fixes.json` the counts.
The data themselves are not touched.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

from finetune.console import strict_json
from finetune.data.forms import unread_columns
from finetune.data.messages import besides
from finetune.data.pipeline import Reading, form_of
from finetune.data.prepare import readings_of
from finetune.data.reading import Reader, rows_of
from finetune.data.repair import Mended, repair
from finetune.data.rows import RowFault
from finetune.data.selection import content_key
from finetune.data.sources import open_source
from finetune.recipe import Recipe
from finetune.runfolder import require_fresh, staged

_DUPLICATE = "an equal conversation came before"


def write_fixed(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes the corrected copy; the folder appears whole or not at all.

    Raises:
        OutputError: the folder holds something already.
        DataError: a source cannot be read.
    """
    require_fresh(folder)
    summary: dict[str, Any] = {}
    with staged(folder) as partial:
        with (partial / "refused.jsonl").open("w", encoding="utf-8") as refused:
            for number, reading in enumerate(readings_of(recipe)):
                name = f"{Path(reading.source.path).name.split('.')[0]}-{number}.jsonl"
                with (partial / name).open("w", encoding="utf-8") as fixed:
                    summary[name] = _fix(reading, fixed, refused)
        (partial / "fixes.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _fix(reading: Reading, fixed: IO[str], refused: IO[str]) -> dict[str, Any]:
    reader = open_source(reading.source)
    form = form_of(reader, reading)
    done: Counter[str] = Counter()
    rows = written = 0
    seen: set[bytes] = set()
    for chunk, _ in reader.chunks(0):
        for position, value in rows_of(chunk):
            rows += 1
            try:
                if isinstance(value, RowFault):
                    raise value
                conversation, fixes = repair(value, form)
                key = content_key(conversation)
                if key in seen:
                    raise RowFault(_DUPLICATE)
            except RowFault as fault:
                _refuse(refused, reader, position, fault, value)
                continue
            seen.add(key)
            done.update(fixes)
            tools = {"tools": conversation[0]["tools"]} if "tools" in conversation[0] else {}
            line = {**unread_columns(value, form), **tools, "messages": _plain(conversation)}
            fixed.write(json.dumps(line, ensure_ascii=False, default=repr) + "\n")
            written += 1
    return {"where": reader.where, "form": form.name, "rows": rows, "written": written, "fixes": dict(done)}


def _plain(conversation: list[Mended]) -> list[dict[str, Any]]:
    """Without `train` where it says nothing, and with the keys of turns that nobody reads."""
    return [
        {
            "role": turn["role"],
            "content": turn["content"],
            **besides(turn),
            **({} if turn["train"] else {"train": False}),
            **turn.get("unread", {}),
        }
        for turn in conversation
    ]


def _refuse(refused: IO[str], reader: Reader, position: int, fault: RowFault, value: Any) -> None:
    row = None if isinstance(value, RowFault) else strict_json(value)
    about = {"where": reader.locate(position), "reason": str(fault), "row": row}
    refused.write(json.dumps(about, default=repr) + "\n")
