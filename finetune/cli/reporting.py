"""What every command does around its work: report, turn a user's mistake into exit status 2, quiet the libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer

from finetune.console import Report
from finetune.disk import full_disk_explained, long_names_explained
from finetune.errors import FinetuneError
from finetune.signals import Interrupted, is_main


@contextlib.contextmanager
def reporting(
    as_json: bool,
    debug: bool,
    *,
    goes_on: str | None = None,
    unfinished: Path | None = None,
    hub_progress: bool = False,
) -> Iterator[Report]:
    """Quiets the libraries, gives a command its report, and turns a user's mistake into one message and exit status 2.

    What a command imports, it imports inside: the libraries read their settings when they are imported.

    Args:
        goes_on: what to say after Ctrl+C, for commands that keep what was done.
        unfinished: the output folder of such a command; nothing is said unless its unfinished one lies beside it.
        hub_progress: the hub's client shows its bars.
    """
    quiet_libraries(debug, hub_progress=hub_progress)
    report = Report(as_json=as_json)
    try:
        disk = full_disk_explained("an output folder, or the cache of a library")
        with report.working(), disk, long_names_explained():
            yield report
    except FinetuneError as error:
        fail(error, debug)
    except Interrupted as stop:
        if is_main():
            sys.stderr.write(f"{stop.what}; to go on:\n  {stop.goes_on}\n" if stop.goes_on else f"{stop.what}\n")
        raise typer.Exit(128 + stop.number) from None
    except KeyboardInterrupt:
        kept = unfinished is None or any(unfinished.absolute().parent.glob(f".{unfinished.name}.*.partial"))
        sys.stderr.write(f"interrupted; {goes_on}\n" if goes_on and kept else "interrupted\n")
        raise typer.Exit(128 + signal.SIGINT) from None


def fail(error: FinetuneError, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(2)


def quiet_libraries(debug: bool, *, hub_progress: bool = False) -> None:
    """Keeps libraries from talking over the report, unless the user asked them to; set before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The allocator's segments grow instead of being split. The memory margin counts on it: 0.3 GiB is reserved beyond
    # the tensors with it (8 x 1024 tokens in 34 GiB, H100).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if debug else "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar redrawn a thousand times is no line of a log file
    if not hub_progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers 5.2x renames arguments that 5.17 knows only by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not debug:
        # Each start on a CPU with AVX-512 BF16 warns of an optional package, of which nothing here makes use.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
