"""`finetune merge`: one command for every format; what belongs to another format is refused before anything is read.

The nf4 format ends with a comparison against the live adapter: each is loaded as any command loads it, the written
folder with every byte that lies on the disk. That needs the model in memory while writing did not, so it comes after
the folder has its name: where the comparison is killed, or has no room, the merged model is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import MergeSource, Weighted, load, open_source
from finetune.console import Report, gib
from finetune.disk import require_fresh, write_json
from finetune.errors import OutputError
from finetune.evaluate import Fidelity, HeldOut, fidelity_between
from finetune.export.formats import DTYPES, write_folder
from finetune.export.gguf import write_gguf
from finetune.export.writing import parse_size
from finetune.moe import Onto, resolve_device

FORMATS = ("nf4", *DTYPES, "gguf")
SHARD_SIZE = "2GB"
FIDELITY_FILE = "fidelity.json"
_UNRECORDED = {
    "trained": "The adapter does not say what it was trained on (it has no base.json): it is merged onto the 4-bit "
    "values of its base. If it was trained on the 16-bit weights, --onto original (bf16, fp16 or gguf) is closer.",
    "original": "The adapter does not say what it was trained on (it has no base.json): it is merged onto its base's "
    "16-bit weights. If it was trained on the NF4 base (QLoRA), --onto trained is closer.",
}


def run_merge(
    adapter: Path,
    report: Report,
    *,
    output: Path,
    format: str = "nf4",
    others: Sequence[str] = (),
    factor: float | None = None,
    onto: str | None = None,
    original: str | None = None,
    base: str | None = None,
    data: str | None = None,
    rows: int = 64,
    shard_size: str | None = None,
    gguf_type: str | None = None,
    attention: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Merges and reports; returns the document of the run.

    Args:
        others: further adapters, `PATH=FACTOR` each.
        factor: of `adapter` itself; 1 by default.
        rows: of the nf4 format's comparison with the live adapter; 0 leaves it out.
        onto: "trained" or "original"; by default what was trained, where the adapter says what that was.
        attention: of the nf4 format, a key of `DTYPES`; bf16 by default.

    Raises:
        FinetuneError: an option does not exist or belongs to another format, or as the format's own function.
    """
    _require_known("--format", format, FORMATS)
    _require_known("--attention", attention or "bf16", tuple(DTYPES))
    _require_known("--onto", onto or "trained", ("trained", "original"))
    for option, given, formats in (
        ("--data", data is not None, ("nf4",)),
        ("--onto original", onto == "original", (*DTYPES, "gguf")),
        ("--original", original is not None, (*DTYPES, "gguf")),
        ("--shard-size", shard_size is not None, ("nf4", *DTYPES)),
        ("--gguf-type", gguf_type is not None, ("gguf",)),
        ("--attention", attention is not None, ("nf4",)),
    ):
        if given and format not in formats:
            raise OutputError(
                f"{option} does not go with --format {format}",
                where="command line",
                allowed=f"--format {' or '.join(formats)}",
                fix="leave it out, or choose such a format",
            )
    require_fresh(output)
    size = shard_size or SHARD_SIZE
    parse_size(size)
    adapters = [Weighted(adapter, 1.0 if factor is None else factor), *map(Weighted.parse, others)]
    is_live = adapters == [Weighted(adapter)]
    if data is not None and not is_live:
        raise OutputError(
            "--data does not go with --with or --factor: no live adapter computes what they merge",
            where="command line",
            allowed="--data with one adapter at its own strength",
            fix="merge without --data, then compare with `finetune evaluate ADAPTER --compare OUTPUT --data DATA`",
        )
    targets: dict[str | None, Onto] = {"trained": "trained", "original": "original"}
    # The nf4 format is of nothing but NF4 experts.
    target = targets.get("trained" if format == "nf4" else onto)
    source = open_source(adapters, onto=target, base_path=base, original=original)
    if not source.recorded and onto is None:
        report.line(_UNRECORDED[source.weights.onto])
    if format == "nf4":
        live = adapter if is_live and rows else None
        writing = {"format": "nf4", "shard_size": size, "attention": attention or "bf16"}
        return _merge_nf4(source, output, report, writing, live=live, base=base, data=data, rows=rows, device=device)
    if format == "gguf":
        return _written(output, write_gguf(source, output, type=gguf_type or "q8_0"), report)
    return _written(output, write_folder(source, output, format=format, shard_size=size), report)


def _merge_nf4(
    source: MergeSource,
    output: Path,
    report: Report,
    writing: dict[str, str],
    *,
    live: Path | None,
    base: str | None,
    data: str | None,
    rows: int,
    device: str,
) -> dict[str, Any]:
    """Writes the folder, then compares it with the adapter folder `live` if that computes the same and has text."""
    held_out = HeldOut(None, None) if live is None else HeldOut.find(live, data)
    # Read, and the device asked for, before hours are spent on writing.
    probe = [] if held_out.name is None else held_out.rows(source.load_tokenizer(), rows, report)
    resolve_device(device)
    document = _written(output, write_folder(source, output, **writing), report)
    if live is None or not probe:
        reason = "no held-out text" if live else "--rows 0" if not rows else "it is not one adapter as it was trained"
        command = f"`finetune evaluate {source.tunings[0].adapter.folder} --compare {output}`"
        report.line(f"Not compared with the live adapter: {reason}; {command} compares any two models")
        return {**document, "fidelity": None}
    # In float32: computing in bfloat16 alone differs more than a merge does, and would hide one that is wrong.
    reference = partial(load, str(live), base_path=base, device=device, dtype="float32")
    written = partial(load, str(output), device=device, dtype="float32")
    try:
        found = fidelity_between(reference, written, probe)
    except torch.OutOfMemoryError:
        report.line(
            "Not compared with the live adapter: the device has no room for the model with float32 beside the experts; "
            f"compare in 16 bits with `finetune evaluate {live} --compare {output}`"
        )
        return {**document, "fidelity": None}
    about = {"format": "nf4", "merged_from": str(live), "base": document["base"], "held_out": held_out.name}
    write_json(output / FIDELITY_FILE, {**about, "dtype": "float32", "fidelity": found.to_dict()})
    _show_fidelity(found, output, report)
    return {**document, "fidelity": found.to_dict()}


def _written(output: Path, about: dict[str, Any], report: Report) -> dict[str, Any]:
    """Says what a folder holds; returns the document of the run."""
    files = about["files"]
    size = gib(sum(files.values()))
    report.line(f"Merged model in {output}: {about['format']}, {len(files)} file(s), {size}, read back whole")
    if about["experts_proven"]:
        report.line("Experts: those that were trained, byte for byte (SHA-256 over all of them)")
    elif about["onto"] == "trained" and about["experts_made_of"] is not None:
        made_of = about["experts_made_of"]
        report.line(
            f"Experts: quantized from {made_of}; no hash in base.json proves that they are those that were trained"
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


def _show_fidelity(fidelity: Fidelity, output: Path, report: Report) -> None:
    table = [
        ("tokens compared", f"{fidelity.tokens:,}"),
        ("completion loss, live adapter", f"{fidelity.reference_loss:.4f} nats"),
        ("completion loss, merged", f"{fidelity.candidate_loss:.4f} nats"),
        ("KL(live || merged)", f"{fidelity.kl:.2e} nats"),
        ("greedy agreement", f"{fidelity.greedy_agreement:.2%}"),
        ("top-k expert overlap", f"{fidelity.top_k_overlap:.2%}"),
    ]
    report.table(f"Merged model in {output}", ("against the live adapter", "value"), table)
