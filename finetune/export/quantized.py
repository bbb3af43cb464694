"""Quantizes a checkpoint once, so that later runs read quantized tensors instead of quantizing again."""

from __future__ import annotations

from pathlib import Path

from finetune.disk import require_fresh, require_space, staged
from finetune.errors import ModelError
from finetune.moe import (
    QUANT_METHOD,
    BaseSpec,
    Census,
    load_base,
    read_config,
    refuse_without_toolkit,
    require_quantized_experts,
    require_storage,
    saved_quantization,
    take_census,
)


def write_quantized(
    path: str,
    output: Path,
    *,
    attention: str = "nf4",
    experts: str = "nf4",
    revision: str | None = None,
    device: str = "auto",
) -> Census:
    """Loads `path` quantized and saves it to `output`, whole or not at all; returns what was saved.

    Raises:
        ModelError: the checkpoint cannot be loaded or is quantized otherwise, or the storage does not exist.
        OutputError: the folder is not empty, or the disk has no room.
    """
    require_storage(attention, experts, where="--")
    require_fresh(output)
    spec = BaseSpec(path, revision, attention, experts=experts)  # type: ignore[arg-type]
    saved = saved_quantization(read_config(path, revision))
    kept = saved.get("experts", "nf4")
    if saved.get("quant_method") == QUANT_METHOD and kept != experts:
        raise ModelError(
            f"the folder keeps its experts in {kept} already",
            where=path,
            allowed=f"--experts {kept}, or a checkpoint in 16 bits",
            fix="start from the original checkpoint",
        )
    # What is not quantized keeps the checkpoint's own 16 bits on every device.
    loaded = load_base(spec, dtype="bfloat16", device=device)
    census = take_census(loaded.model)
    require_quantized_experts(census)
    require_space(output, census.total_bytes, what="the quantized model")
    with staged(output) as folder:
        loaded.model.save_pretrained(folder)
        refuse_without_toolkit(folder)
        loaded.tokenizer.save_pretrained(folder)
    return census
