"""`finetune merge`: one command for every format; what belongs to another format is refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.console import Report, gib
from finetune.errors import OutputError
from finetune.evaluate import Fidelity
from finetune.export.gguf import write_gguf
from finetune.export.merge import merge_adapter
from finetune.export.source import open_source
from finetune.export.standard import DTYPES, parse_size, write_standard
from finetune.export.trained_base import Onto
from finetune.export.tunings import Weighted
from finetune.runfolder import require_fresh

FORMATS = ("nf4", *DTYPES, "gguf")
# Option -> the formats that it belongs to.
_BELONGS = {
    "--data": ("nf4",),
    "--with": (*DTYPES, "gguf"),
    "--factor": (*DTYPES, "gguf"),
    "--onto original": (*DTYPES, "gguf"),
    "--original": (*DTYPES, "gguf"),
    "--shard-size": tuple(DTYPES),
    "--gguf-type": ("gguf",),
}


def run_merge(
    adapter: Path,
    report: Report,
    *,
    output: Path,
    format: str = "nf4",
    others: Sequence[str] = (),
    factor: float | None = None,
    onto: str = "trained",
    original: str | None = None,
    base: str | None = None,
    data: str | None = None,
    rows: int = 64,
    shard_size: str | None = None,
    gguf_type: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Merges and reports; returns the document of the run.

    Args:
        others: further adapters, `PATH=FACTOR` each.
        factor: of `adapter` itself; 1 by default.

    Raises:
        FinetuneError: an option does not exist or belongs to another format, or as the format's own function.
    """
    asked = {
        "--data": data is not None,
        "--with": bool(others),
        "--factor": factor is not None,
        "--onto original": onto == "original",
        "--original": original is not None,
        "--shard-size": shard_size is not None,
        "--gguf-type": gguf_type is not None,
    }
    _require_known("--format", format, FORMATS)
    _require_known("--onto", onto, ("trained", "original"))
    for option in (option for option, given in asked.items() if given and format not in _BELONGS[option]):
        raise OutputError(
            f"{option} does not go with --format {format}",
            where="command line",
            allowed=f"--format {' or '.join(_BELONGS[option])}",
            fix="leave it out, or choose such a format",
        )
    require_fresh(output)
    if format == "nf4":
        fidelity = merge_adapter(adapter, output, base_path=base, data=data, max_rows=rows, device=device)
        _show_fidelity(fidelity, output, report)
        return {"output": str(output), "fidelity": None if fidelity is None else fidelity.to_dict()}
    parse_size(shard_size or "4GB")
    adapters = [Weighted(adapter, 1.0 if factor is None else factor), *map(Weighted.parse, others)]
    target: Onto = "original" if onto == "original" else "trained"
    source = open_source(adapters, onto=target, base_path=base, original=original)
    if format == "gguf":
        about = write_gguf(source, output, type=gguf_type or "q8_0")
    else:
        about = write_standard(source, output, format=format, shard_size=shard_size or "4GB")
    files = about["files"]
    report.line(
        f"Merged model in {output}: {format}, {len(files)} file(s), {gib(sum(files.values()))}, read back whole"
    )
    report.line(f"What serves it, with a command for each engine: {output / 'SERVING.md'}")
    return {"output": str(output), **about}


def _require_known(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OutputError(
            f"{option} {value!r} does not exist",
            where="command line",
            allowed=", ".join(allowed),
            fix="choose one of them",
        )


def _show_fidelity(fidelity: Fidelity | None, output: Path, report: Report) -> None:
    if fidelity is None:
        report.line(f"Merged model in {output} (no held-out text: not compared with the live adapter)")
        return
    table = [
        ("tokens compared", f"{fidelity.tokens:,}"),
        ("completion loss, live adapter", f"{fidelity.reference_loss:.4f} nats"),
        ("completion loss, merged", f"{fidelity.candidate_loss:.4f} nats"),
        ("KL(live || merged)", f"{fidelity.kl:.2e} nats"),
        ("greedy agreement", f"{fidelity.greedy_agreement:.2%}"),
        ("top-k expert overlap", f"{fidelity.top_k_overlap:.2%}"),
    ]
    report.table(f"Merged model in {output}", ("against the live adapter", "value"), table)
