"""Quantizes a checkpoint once, so that later runs read 4-bit tensors instead of quantizing again."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from finetune.errors import ModelError
from finetune.model import BaseSpec, load_base
from finetune.quant import Census, require_quantized_experts, take_census
from finetune.quant.config import AttentionStorage
from finetune.runfolder import require_fresh, require_space, staged


def write_quantized(
    path: str, output: Path, *, attention: str = "nf4", revision: str | None = None, device: str = "auto"
) -> Census:
    """Loads `path` in 4-bit and saves it to `output`, whole or not at all; returns what was saved.

    Raises:
        ModelError: the checkpoint cannot be loaded, or the storage does not exist.
        OutputError: the folder is not empty, or the disk has no room.
    """
    if attention not in get_args(AttentionStorage):
        raise ModelError(
            f"attention storage {attention!r} does not exist",
            where="--attention",
            allowed=" or ".join(get_args(AttentionStorage)),
            fix="use nf4 for the least memory",
        )
    require_fresh(output)
    # What is not quantized keeps the checkpoint's own 16 bits on every device.
    loaded = load_base(BaseSpec(path, revision, attention), dtype="bfloat16", device=device)  # type: ignore[arg-type]
    census = take_census(loaded.model)
    require_quantized_experts(census)
    require_space(output, census.total_bytes, what="the quantized model")
    with staged(output) as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return census
