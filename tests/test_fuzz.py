"""300 changed inputs of each kind: used or refused, and nothing else. `scripts/fuzz.py --cases 10000` runs more.

One model in ten that passes every check is loaded as well.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


@pytest.mark.usefixtures("scripts")
def test_every_changed_input_is_used_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fuzz

    status = fuzz.main(["--cases", "300", "--load-every", "10", "--keep", str(tmp_path)])
    table = capsys.readouterr().out
    assert status == 0, table
    for line in table.splitlines()[-5:]:
        kind, cases, used, refused, *failures, _ = line.split()
        assert int(cases) == int(used) + int(refused) == 300, kind
        assert int(used) >= 10, f"{kind}: the inputs are too far from sound ones"
        assert failures == ["0", "0", "0"]


@pytest.mark.usefixtures("scripts")
def test_what_it_looks_for_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a hang and the death of the process, each kept with its seed; the cases after it are run."""
    import fuzz
    import fuzz_kinds

    acts = {
        "one": lambda: 1 // 0,
        "two": lambda: time.sleep(60),
        "three": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }

    class Faulty(fuzz_kinds.Kind):
        def case(self, rng: object) -> fuzz_kinds.Case:
            seen = {path.suffix for path in tmp_path.glob("seen.*")}
            name = next((name for name in acts if f".{name}" not in seen), "sound")
            (tmp_path / f"seen.{name}").touch()
            return fuzz_kinds.Case(name, name.encode(), acts.get(name, lambda: None))

    monkeypatch.setitem(fuzz_kinds.KINDS, "faulty", Faulty)
    tally = fuzz.fuzz("faulty", range(6), tmp_path, timeout=0.5, keep=tmp_path / "kept")
    assert dict(tally.counts) == {"traceback": 1, "hang": 1, "signal": 1, "used": 3}
    kept = {file.read_text() for file in (tmp_path / "kept").glob("*.bin")}
    assert kept == {"one", "two", "three"}
    assert "ZeroDivisionError" in (tmp_path / "kept" / "faulty-0.txt").read_text()
