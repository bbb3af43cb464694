"""Seeded fuzzing: changed recipes, JSON files, safetensors headers, data files and HTTP bodies, each used or refused.

    scripts/fuzz.py --cases 10000                   # every kind, a table, exit status 1 on any failure
    scripts/fuzz.py --kinds json --cases 1 --seed 7 # one case again

Each kind runs in a worker process that calls what the commands call (see `fuzz_kinds.py`). A case ends as used, as
refused (a `FinetuneError`, which the command line prints and exits with 2), or as a failure: an exception of another
kind, no answer within `--timeout` seconds, or the death of the process. Then the input is kept under `--keep` with its
seed, and a new worker goes on with the next one.

Leaves out: what happens after a model is loaded and has run once, and everything that needs a GPU or a network.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

FAILURES = ("traceback", "hang", "signal")
_LONGEST_MESSAGE = 20_000  # a path of thousands of characters is named, a file is not printed
_KEPT = 20  # inputs of a kind


@dataclass
class Tally:
    """What became of a kind's cases; `shown` is the first of each failure that looks alike."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, str] = field(default_factory=dict)
    alike: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        return sum(self.counts[name] for name in FAILURES)


def work(name: str, seeds: range, root: Path, load_every: int, said: Connection) -> None:
    """The worker: tells each case's seed before and its outcome after."""
    import fuzz_kinds

    from finetune.disk import long_names_explained
    from finetune.errors import FinetuneError

    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    material = fuzz_kinds.Material(*(root / part for part in fuzz_kinds.Material.__dataclass_fields__))
    with fuzz_kinds.opened(name, material, root / f"{name}-{seeds.start}", load_every) as kind:
        for seed in seeds:
            case = kind.case(Random(f"{name} {seed}"))
            said.send((seed, "begun", case.name, case.content))
            outcome, detail = "used", ""
            try:
                with long_names_explained():  # as around every command
                    case.act()
            except FinetuneError as error:
                outcome = "refused"
                if "Traceback" in str(error) or len(str(error)) > _LONGEST_MESSAGE:
                    outcome, detail = "traceback", f"a message of {len(str(error))} characters"
            except BaseException as error:  # noqa: BLE001  # what ends the process in a user's hands is looked for here
                outcome, detail = "traceback", "".join(traceback.format_exception(error))
            said.send((seed, outcome, detail, b""))
    said.send((seeds.stop, "ended", "", b""))
    os._exit(0)  # threads of a server or a pool do not hold it up


def fuzz(name: str, seeds: range, root: Path, *, timeout: float, keep: Path, load_every: int = 1) -> Tally:
    """Runs a kind's cases, with as many workers one after another as it takes."""
    tally, begun = Tally(), time.perf_counter()
    context = multiprocessing.get_context("fork")  # a worker starts with everything imported
    at = seeds.start
    while at < seeds.stop:
        heard, said = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(name, range(at, seeds.stop), root, load_every, said))
        worker.start()
        said.close()
        case, content = "", b""
        while True:
            try:
                if not heard.poll(timeout if content else timeout + 60):
                    outcome, detail = "hang", f"no answer within {timeout:.0f} s"
                else:
                    at, outcome, detail, sent = heard.recv()
            except EOFError:
                worker.join()
                outcome, detail = "signal", f"the process ended with {worker.exitcode}"
            if outcome == "begun":
                case, content = detail, sent
                continue
            if outcome == "ended":
                break
            tally.counts[outcome] += 1
            if outcome in FAILURES:
                note(tally, keep, f"{name}-{at}", case, content, outcome, detail)
            at += 1
            if outcome in ("hang", "signal"):
                break
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
    tally.seconds = time.perf_counter() - begun
    return tally


def note(tally: Tally, keep: Path, stem: str, case: str, content: bytes, outcome: str, detail: str) -> None:
    """Keeps a failing input, and counts it among those that look like it."""
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("File ") and "/finetune/" in line]
    look = f"{outcome}: {lines[-1][:160] if lines else ''} [{ours[-1].rpartition('/finetune/')[2] if ours else ''}]"
    look = f"{outcome} {case.split(' ')[0]}: {look.partition(': ')[2]}"
    tally.alike[look] += 1
    if look not in tally.shown and len(tally.shown) < _KEPT:
        tally.shown[look] = stem
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{stem}.bin").write_bytes(content)
        (keep / f"{stem}.txt").write_text(f"{case}\n{outcome}\n{detail}\n", encoding="utf-8", errors="replace")


def main(argv: list[str] | None = None) -> int:
    import fuzz_kinds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="of each kind")
    parser.add_argument("--kinds", default=",".join(fuzz_kinds.KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--timeout", type=float, default=20, help="seconds of a case")
    parser.add_argument(
        "--load-every", type=int, default=1, help="of so many sound models one is loaded; others checked"
    )
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"), help="where failing inputs go")
    asked = parser.parse_args(argv)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="moe-qlora-fuzz-") as scratch:
        fuzz_kinds.make_material(Path(scratch))
        print(
            f"{'kind':10}{'cases':>8}{'used':>8}{'refused':>9}"
            + "".join(f"{name:>11}" for name in FAILURES)
            + "   seconds"
        )
        for name in asked.kinds.split(","):
            seeds = range(asked.seed, asked.seed + asked.cases)
            tally = fuzz(
                name, seeds, Path(scratch), timeout=asked.timeout, keep=asked.keep, load_every=asked.load_every
            )
            numbers = f"{asked.cases:>8}{tally.counts['used']:>8}{tally.counts['refused']:>9}"
            numbers += "".join(f"{tally.counts[failure]:>11}" for failure in FAILURES)
            print(f"{name:10}{numbers}{tally.seconds:>10.1f}", flush=True)
            for look, count in tally.alike.most_common():
                print(f"  {count} x {look}  ({asked.keep / tally.shown.get(look, '-')})")
            failures += tally.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
