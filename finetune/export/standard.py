"""Writes a merge as a plain 16-bit checkpoint in the layout of the hub, which every engine reads.

The experts' matrices stand one by one under the names that the family has on the hub (Mixtral:
`block_sparse_moe.experts.N.w1/w2/w3`), in safetensors shards of a stated size. What reads them, a shard's size apart,
is memory for one expert's matrix: the header of a shard is known before its tensors are, since all shapes are.

Merged onto the base that was trained, an expert's weight is the value that its NF4 bytes stand for: what was trained is
what is served, in 16 bits. Merged onto the original, the experts are the original ones: a model that nobody trained,
often as good (`fidelity.json` of the nf4 format measures only the first).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.checkpoint import read_json
from finetune.export.resumable import resumable
from finetune.export.serving import write_serving
from finetune.export.shards import Made, Stored, parse_size, write_shards
from finetune.export.source import MergeSource
from finetune.moe import EXPERT_PROJECTIONS, hub_expert_names, hub_name, role_of
from finetune.runfolder import write_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MERGE_FILE = "merge.json"


def write_standard(source: MergeSource, output: Path, *, format: str, shard_size: str) -> dict[str, Any]:
    """Writes the merged checkpoint to `output`, whole or not at all, going on where a killed one stopped.

    Args:
        format: a key of `DTYPES`.
        shard_size: the largest size of a file, like "4GB".

    Returns what merge.json says, and `made_bytes`, what was not there from an earlier start.

    Raises:
        AdapterError: a merged weight is not finite.
        ModelError: a weight is too large for float16.
        OutputError: the folder is not empty, the disk is full or broken, or the size cannot be read.
    """
    dtype = DTYPES[format]
    limit = parse_size(shard_size)
    tokenizer = source.load_tokenizer()
    plan = _plan(source, dtype)
    job = {**source.identity, "format": format, "shard_size": limit}
    with resumable(output, job) as partial:
        files, made = write_shards(partial, plan, limit, title=f"merge to {format}")
        folder = partial.folder
        write_json(folder / "config.json", plain_config(source.config, format))
        source.copy_generation_config(folder)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_for_all(folder)
        about = {**source.to_dict(), "format": format, "files": files}
        write_json(folder / MERGE_FILE, about)
        write_serving(folder, about, name=output.name, chat_template=None)
    return {**about, "made_bytes": made}


def plain_config(config: dict[str, Any], format: str) -> dict[str, Any]:
    """A base's config.json for 16-bit weights, with the keys that readers before transformers 5 look for as well.

    Without `rope_theta` at the top they would take their own default for it without a word.
    """
    name = str(DTYPES[format]).removeprefix("torch.")
    plain = {**config, "dtype": name, "torch_dtype": name}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        plain.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain.setdefault("rope_scaling", None if rope.get("rope_type", "default") == "default" else scaling)
    return plain


def _plan(source: MergeSource, dtype: torch.dtype) -> list[Made]:
    """All tensors in order of the layers."""
    made = []
    arch = source.arch
    for name, shape in source.shapes.items():
        if role_of(name) != "experts":

            def parameter(name: str = name) -> Sequence[Tensor]:
                return [source.parameter(name, dtype)]

            made.append(Made({hub_name(arch.model_type, name): Stored(dtype, shape)}, [parameter]))
            continue
        layer, projection = int(name.split(".")[2]), name.rpartition(".")[2]
        assert projection in EXPERT_PROJECTIONS, name
        for expert in range(arch.experts):
            names = hub_expert_names(arch.model_type, layer, expert, projection)
            matrix = Stored(dtype, (shape[1] // len(names), shape[2]))

            def matrices(
                layer: int = layer, expert: int = expert, projection: str = projection, count: int = len(names)
            ) -> Sequence[Tensor]:
                return source.expert(layer, expert, projection, dtype).chunk(count)

            made.append(Made(dict.fromkeys(names, matrix), [matrices]))
    return made


def _name_tokenizer_for_all(folder: Path) -> None:
    """transformers 5 saves a class name that 4 does not know; both know the older name of the same class."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
